"""Compiled modules: call them, replace their weights, save and load them."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch.export import ExportedProgram

from reweft import _core
from reweft.checkpoint import Checkpoint
from reweft.errors import UsageError
from reweft.torch.calling import Batches, Call
from reweft.torch.host import HostWarning
from reweft.torch.sources import Source, source_of
from reweft.torch.tensors import tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from reweft.keymap import KeyMap

__all__ = ["CompiledModule", "Refittable", "ReplaceReport", "Weights", "load", "replace_weights", "report_of", "save"]


@dataclass(frozen=True)
class ReplaceReport:
    """What `replace_weights` did."""

    slots: int
    """Slots that keys filled."""
    kept: tuple[str, ...]
    """Slots that kept their bytes."""
    nbytes: int
    """Bytes of the filled slots."""
    bytes_copied: int
    """Of these, bytes that were copied. The others are used where the mapped file, or whoever lent them, has them."""
    notices: tuple[str, ...]
    """What a careful reader should know."""


@dataclass(frozen=True)
class Refittable:
    """What became of a module's tensors when it was compiled."""

    slots: tuple[tuple[str, ...], ...]
    """The names of every tensor that can be replaced: the first, then those of tied weights."""
    unused: tuple[str, ...]
    """Tensors that the program never reads."""
    unrefittable: dict[str, str]
    """Tensors that the program depends on and that cannot be replaced, with the reason."""
    rule: str = "any"
    """Which new weights the slots take: "any", "identical" ones alone (traced with `identical_weights`), or "never" any
    (`immutable_weights`)."""


class CompiledModule:
    """A compiled program that runs, with weights that can be replaced while it does. Made by `trace` and `load`.

    Call it like the module it was traced from. It may be called from several threads; calls hold no interpreter lock.
    It computes without gradients.
    """

    inline_weights: bool
    """Whether `save` writes the weights into the package; False for one that was opened without them."""

    def __init__(self, core: _core.Model, *, inline_weights: bool | None = None) -> None:
        self._core = core
        self.inline_weights = not core.is_stripped if inline_weights is None else inline_weights
        self._call = Call(core)
        self._batches = Batches(self._call) if core.batching() == "chunks" else None
        # What `trace` leaves for `dynamic_batch`: the module while it lives, and inputs that the program takes.
        self._traced: Callable[[], torch.nn.Module | None] = lambda: None
        self._examples: list[torch.Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Inputs cross without a copy, unless their strides are not those the program was compiled for.

        Raises:
            UsageError: The arguments have another structure than the examples had.
            MismatchError: An input has another dtype, shape or device than the program takes, or an argument that is no
                tensor another value than it was compiled with.
            RunError: The program failed, the package was stripped of its weights and has not been given any, or the
                process was forked and it would wait for threads that are gone.
        """
        if self._batches is not None:
            return self._batches.run(self._run_chunks, args, kwargs)
        outputs = self._core.run_fitting(args) if self._call.is_flat and not kwargs else None
        if outputs is None:
            outputs = self._core.run(self._call.arguments(self._core, args, kwargs))
        return self._call.results(outputs)

    def _run_chunks(self, chunks: list[list[torch.Tensor]]) -> list[list[Any]]:
        """Run once for each chunk, all on one set of weights, as many at a time as there are replicas."""
        return self._core.run_chunks(chunks)

    def _twin(self) -> CompiledModule:
        """A second model of the same program with the same weights."""
        # What is copied refers to the program and not to the model.
        twin = copy.copy(self)
        twin._core = self._core.twin()  # noqa: SLF001  (one class)
        return twin

    @property
    def path(self) -> Path:
        """The package that it was loaded from; `trace` makes one that is gone already."""
        return self._core.path

    def slots(self) -> list[tuple[str, ...]]:
        """The names of every tensor that can be replaced: the first, then those of tied weights."""
        names, _unused = self._core.names()
        return [tuple(slot) for slot in names]

    def refittable(self) -> Refittable:
        """Which weights can be replaced, and which cannot, by name."""
        slots, unused = self._core.names()
        absent, rule = dict(self._core.unrefittable()), self._core.refit_rule()
        return Refittable(tuple(map(tuple, slots)), tuple(unused), absent, rule)

    @property
    def load_report(self) -> ReplaceReport | None:
        """What `load(path, weights=...)` did with the weights; None if there were none."""
        report = self._core.load_report()
        return None if report is None else report_of(report)

    @property
    def weights_version(self) -> str:
        """A hash of the weights in use: of names, dtypes, shapes, strides and elements.

        Equal for equal weights, whatever they came from, also after others served in between; `reweft inspect` prints
        that of a package. Buffers that the program writes to are left out. The first look after a replacement reads the
        weights that it brought, further ones read nothing; tensors that were shared with `copy=False` are read each
        time. A replacement never computes it.

        Raises:
            RunError: The package was stripped of its weights and has not been given any.
            FormatError: Weights of the package are not those that its manifest states; the message names the slot.
        """
        return self._core.weights_version()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights in use, copied, under the slots' names; tied weights are there once for each name.

        Weights that a frozen program has only as what was made of them are not there; `slots` names them too.

        Raises:
            RunError: The package was stripped of its weights and has not been given any.
        """
        checkpoint = Checkpoint(self._core.state())
        state: dict[str, torch.Tensor] = {}
        for names in self.slots():
            if names[0] not in checkpoint:
                continue
            value = tensor(checkpoint[names[0]])
            state.update(dict.fromkeys(names, value))
        return state

    def __repr__(self) -> str:
        inputs = ", ".join(f"{item.name}: {item.dtype} {list(item.shape)}" for item in self._call.inputs)
        return f"<CompiledModule ({inputs}), {len(self.slots())} slots>"


Weights: TypeAlias = (
    torch.nn.Module
    | ExportedProgram
    | Mapping[str, torch.Tensor]
    | str
    | os.PathLike[str]
    | Checkpoint
    | CompiledModule
)
"""What weights may come from."""


def load(
    path: str | os.PathLike[str],
    *,
    weights: Weights | None = None,
    replicas: int = 1,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    strict: bool = True,
    allow_cast: bool = False,
    single_threaded: bool = False,
    threads: int | None = None,
    device: str | torch.device | None = None,
    standby: bool = False,
) -> CompiledModule:
    """Open a package that `save` wrote, and run it. **Runs native code from the package**: it is a program.

    Reads all packaged weights once to compare their CRC, and maps them; nothing is copied but buffers that the program
    writes to. The file must not be truncated or overwritten while the model lives; replacing it by a rename, as
    `reweft.refit` does, is safe.

    The library is unpacked once into the user's cache of libraries (`reweft cache`), whatever processes load it, and
    opened once in each; where there is no folder that only this user can write to, into a temporary file.
    After a fork, a child may call and refit a model that no other thread was using, with one thread for each operator.
    Ctrl-C during a call is delivered when the call returns.

    What `trace` recorded of the host that compiled is compared with this one before any code is loaded.
    With `weights`, the model starts on those, as if `replace_weights` had been called, and packaged weights that they
    take the place of are not read; `load_report` says what was done. A package without weights, as
    `save(inline_weights=False)` and `reweft.strip` write, needs them before it runs: here, or by `replace_weights`.

    Args:
        path: The `.pt2` package.
        weights: Weights to start on; see `replace_weights`.
        replicas: Calls that may run at the same time. They share the weights.
        top_level_key: Dotted path of the dict that holds the weights; for files.
        keys: Rules from keys to slot names; None means identical names.
        strict: If True, a slot without a key or a key without a slot is an error. If False, slots without a key keep
            what the package has for them; where it has nothing, it is an error still.
        allow_cast: Convert between float dtypes, rounding to nearest even.
        single_threaded: Calls follow one another, without a pool of replicas.
        threads: Threads that an operator takes within a call, set on the calling thread for the time of the call; None
            leaves it to `torch.set_num_threads`. With several callers, 1 is what scales. Loops that the compiler wrote
            for a fixed number keep it, which is a warning.
        device: What the program must have been compiled for; it is never moved.
        standby: Keep the memory of copied weights when they are replaced, for the copies of the next replacement. Twice
            the memory of the weights; a replacement from memory then costs what copying the bytes does, while fresh
            pages cost several times that. Nothing changes for weights that are used where a file has them.

    Raises:
        FormatError: The package, or the file of weights, is damaged.
        UnsupportedError: It was not made by `trace`, or needs what the runtime or this host does not have: a machine,
            instructions of its processor, a device, a version of torch. Nothing in it was run.
        MismatchError: The weights do not fit.
        UsageError: Several replicas of a program that writes to buffers, a program for another device, or options of
            weights without any.
        RunError: The loader refuses the library.
        IoError: The file cannot be read.

    Warns:
        HostWarning: It was compiled by another minor version of torch, for what cannot be looked up here, or for
            another number of threads.
    """
    if weights is None and (top_level_key is not None or keys is not None):
        raise UsageError("top_level_key and keys are for weights, of which there are none")
    checkpoint = None
    if weights is not None:
        # These have tensors that are in no state_dict; the slots say which of them are wanted.
        needs_names = isinstance(weights, torch.nn.Module | ExportedProgram)
        names = [tuple(slot) for slot in _core.slot_names(path)] if needs_names else []
        checkpoint = _rekeyed(_source(names, weights, top_level_key).checkpoint, keys)._core  # noqa: SLF001  (one package)
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    core = _core.Model.open(
        path,
        libtorch=libtorch,
        replicas=replicas,
        weights=checkpoint,
        cast=allow_cast,
        missing=not strict,
        unused=not strict,
        single_threaded=single_threaded,
        threads=threads,
        device=None if device is None else str(device),
        standby=standby,
    )
    for notice in core.notices():
        warnings.warn(f"{os.fspath(path)}: {notice}", HostWarning, stacklevel=2)
    return CompiledModule(core)


def save(model: CompiledModule, path: str | os.PathLike[str], *, inline_weights: bool | None = None) -> None:
    """Write the package with the weights in use. Costs one copy of it; the file appears whole or not at all.

    The result is a plain AOTInductor package that `torch._inductor.aoti_load_package` loads with its weights.

    Args:
        model: The model.
        path: The `.pt2` package to write.
        inline_weights: If False, the weights of the state_dict are left out, and only reweft opens the result:
            `load(path, weights=...)`, or `reweft.refit` to make a whole package of it. It holds the program, a few
            megabytes, and what no state_dict has. None means as the model was traced or loaded.

    Raises:
        IoError: Writing failed; `path` is as it was.
        UsageError: There are no weights to leave out.
        RunError: The package was stripped of its weights and has not been given any.
    """
    inline = model.inline_weights if inline_weights is None else inline_weights
    batched = model._batches is not None  # noqa: SLF001  (one package)
    model._core.save(path, inline_weights=inline, chunks=batched)  # noqa: SLF001


def replace_weights(
    model: CompiledModule,
    weights: Weights,
    *,
    strict: bool = True,
    allow_cast: bool = False,
    keys: KeyMap | None = None,
    copy: bool = True,
    state: Literal["replace", "keep"] = "replace",
    top_level_key: str | None = None,
    allow_missing: bool | None = None,
    allow_unused: bool | None = None,
) -> ReplaceReport:
    """Replace the weights of a model, all or none, while it serves.

    Calls that are running finish on the old weights; calls that start afterwards use the new ones, and no call waits
    for another because of it. When this returns, the last call has left the old weights and their memory is released.

    Tensors in memory are copied, so that a later edit of them changes nothing here. A path is mapped, and tensors whose
    layout is the slot's are used where the file has them, after their CRC was compared: the file must not be truncated
    or overwritten while the model lives. The weights of another model are shared with it.

    With `copy=False`, tensors in memory are shared with the caller if dtype, strides and alignment are the slot's and
    the program does not write to it. What could not be shared is copied, counted in `bytes_copied` and named in a
    notice. **Whoever shares promises** that the tensors keep their storage until the model has other weights or is
    gone: no `resize_`, no `set_`, nothing that frees or moves it; dropping the tensors is safe, the model holds the
    storage. An edit in place shows at once, also in the middle of a call, which then computes with some old and some
    new elements. Of two tensors that are tied in the model only the first is followed.

    Args:
        model: The model.
        weights: A module of the same architecture, or its exported program, a state_dict, a checkpoint file, an open
            checkpoint, or another compiled module.
        strict: If True, a slot without a key or a key without a slot is an error. If False, slots without a key stay as
            they are and keys without a slot are left out.
        allow_cast: Convert between float dtypes, rounding to nearest even.
        keys: Rules from keys to slot names; None means identical names.
        copy: If False, share tensors in memory instead of copying them.
        state: What becomes of buffers that the program writes to: "replace" takes their value from `weights` if it is
            there, "keep" leaves them as they are, whether it is there or not.
        top_level_key: Dotted path of the dict that holds the weights; for files.
        allow_missing: Leave slots as they are for which there is no key; None means `not strict`.
        allow_unused: Leave out keys for which there is no slot; None means `not strict`.

    Warns:
        UserWarning: The model has no weights that could be replaced; nothing happens.

    Raises:
        MismatchError: Something differs, is missing or left over, or the model was traced with `immutable_weights` or
            `identical_weights`. The old weights stay.
        FormatError: The file is damaged. The old weights stay.
        UnsupportedError: A tensor is of a kind that reweft does not read. The old weights stay.
        UsageError: The arguments make no sense. The old weights stay.
        RunError: `weights` is a model that has none itself.
        IoError: The file cannot be read. The old weights stay.
    """
    if state not in {"replace", "keep"}:
        raise UsageError(f'state is {state!r}, wanted "replace" or "keep"')
    slots = model.slots()
    if not slots:
        warnings.warn("the model has no weights that could be replaced", stacklevel=2)
    # A frozen model cannot give all its weights back, but it can give what was made of them.
    rows = isinstance(weights, CompiledModule) and keys is None and model._core.has_rows_of(weights._core)  # noqa: SLF001
    source = _source(slots, weights, top_level_key, rows=rows)
    report = model._core.refit(  # noqa: SLF001  (one package)
        _rekeyed(source.checkpoint, keys)._core,  # noqa: SLF001
        cast=allow_cast,
        missing=not strict if allow_missing is None else allow_missing,
        unused=not strict if allow_unused is None else allow_unused,
        lend=not copy,
        lend_written=False,
        keep_written=state == "keep",
        rows=rows,
    )
    return report_of(report) if copy or not source.resolved else _with_resolved(report_of(report), source)


def report_of(report: str) -> ReplaceReport:
    """The engine's report, which is JSON."""
    data = json.loads(report)
    return ReplaceReport(
        slots=data["slots"],
        kept=tuple(data["kept"]),
        nbytes=data["nbytes"],
        bytes_copied=data["nbytes_copied"],
        notices=tuple(data["notices"]),
    )


def _with_resolved(report: ReplaceReport, source: Source) -> ReplaceReport:
    """Say that lazily conjugated and negated tensors were copied, which the engine cannot see."""
    names = ", ".join(source.resolved)
    notice = f"copied and not shared, because their values are not their bytes: {names}"
    nbytes = report.bytes_copied + sum(source.resolved.values())
    return replace(report, bytes_copied=nbytes, notices=(*report.notices, notice))


def _source(slots: list[tuple[str, ...]], weights: Weights, top_level_key: str | None, *, rows: bool = False) -> Source:
    if isinstance(weights, CompiledModule):
        if top_level_key is not None:
            raise UsageError("top_level_key is for checkpoint files")
        return Source(Checkpoint(weights._core.state(rows=rows)))  # noqa: SLF001  (one package)
    return source_of(slots, weights, top_level_key)


def _rekeyed(checkpoint: Checkpoint, keys: KeyMap | None) -> Checkpoint:
    return checkpoint if keys is None else checkpoint.rekey(keys)
