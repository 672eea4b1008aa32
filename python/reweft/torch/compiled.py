"""Compiled modules: call them, replace their weights, save and load them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reweft import _core
from reweft.checkpoint import Checkpoint
from reweft.checkpoint import open as open_checkpoint
from reweft.errors import MismatchError, UsageError
from reweft.torch.calling import Call
from reweft.torch.host import HostWarning
from reweft.torch.tensors import checkpoint_of, held_tensors, tensor

if TYPE_CHECKING:
    from reweft.keymap import KeyMap

__all__ = ["CompiledModule", "Refittable", "ReplaceReport", "load", "replace_weights", "save"]


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
    """Of these, bytes that were copied. The others are used where the mapped checkpoint has them."""
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


class CompiledModule:
    """A compiled program that runs, with weights that can be replaced while it does. Made by `trace` and `load`.

    Call it like the module it was traced from. It may be called from several threads; calls hold no interpreter lock.
    It computes without gradients.
    """

    def __init__(self, core: _core.Model) -> None:
        self._core = core
        self._call = Call(core)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Inputs cross without a copy, unless their strides are not those the program was compiled for.

        Raises:
            UsageError: The arguments have another structure than the examples had.
            MismatchError: An input has another dtype, shape or device than the program takes, or an argument that is no
                tensor another value than it was compiled with.
            RunError: The program failed.
        """
        inputs = self._call.arguments(args, kwargs)
        # The two functions pass tensors by handle; torch documents no public ones that cost no copy.
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)  # noqa: SLF001
        outputs = self._core.run(handles)
        made = iter(
            torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(  # noqa: SLF001
                [handle for handle in outputs if handle is not None]
            )
        )
        return self._call.results(None if handle is None else next(made) for handle in outputs)

    @property
    def path(self) -> Path:
        """The package that it was loaded from; `trace` makes one that is gone already."""
        return self._core.path

    def slots(self) -> list[tuple[str, ...]]:
        """The names of every slot: the first, then those of tied weights."""
        names, _unused = self._core.names()
        return [tuple(slot) for slot in names]

    def refittable(self) -> Refittable:
        """Which weights can be replaced, and which cannot, by name."""
        _names, unused = self._core.names()
        return Refittable(tuple(self.slots()), tuple(unused), dict(self._core.unrefittable()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights in use, copied, under the slots' names; tied weights are there once for each name."""
        checkpoint = Checkpoint(self._core.state())
        state: dict[str, torch.Tensor] = {}
        for names in self.slots():
            value = tensor(checkpoint[names[0]])
            state.update(dict.fromkeys(names, value))
        return state

    def __repr__(self) -> str:
        inputs = ", ".join(f"{item.name}: {item.dtype} {list(item.shape)}" for item in self._call.inputs)
        return f"<CompiledModule ({inputs}), {len(self.slots())} slots>"


def load(path: str | os.PathLike[str], *, replicas: int = 1) -> CompiledModule:
    """Open a package that `save` wrote, and run it. **Runs native code from the package**: it is a program.

    Reads all weights once to compare their CRC, and maps them; nothing is copied but buffers that the program
    writes to. The file must not be truncated or overwritten while the model lives; replacing it by a rename, as
    `reweft.refit` does, is safe.

    The library is unpacked once into the user's cache of libraries (`reweft cache`), whatever processes load it, and
    opened once in each; where there is no folder that only this user can write to, into a temporary file.
    What `trace` recorded of the host that compiled is compared with this one before any code is loaded.

    Args:
        path: The `.pt2` package.
        replicas: Calls that may run at the same time. They share the weights.

    Raises:
        FormatError: The package is damaged.
        UnsupportedError: It was not made by `trace`, or needs what the runtime or this host does not have: a machine,
            instructions of its processor, a device, a version of torch. Nothing in it was run.
        UsageError: Several replicas of a program that writes to buffers.
        RunError: The loader refuses the library.
        IoError: The file cannot be read.

    Warns:
        HostWarning: It was compiled by another minor version of torch, or for what cannot be looked up here.
    """
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    core = _core.Model.open(path, libtorch=libtorch, replicas=replicas)
    for notice in core.notices():
        warnings.warn(f"{os.fspath(path)}: {notice}", HostWarning, stacklevel=2)
    return CompiledModule(core)


def save(model: CompiledModule, path: str | os.PathLike[str]) -> None:
    """Write the package with the weights in use. Costs one copy of it; the file appears whole or not at all.

    The result is a plain AOTInductor package that `torch._inductor.aoti_load_package` loads with its weights.

    Raises:
        IoError: Writing failed; `path` is as it was.
    """
    model._core.save(path)  # noqa: SLF001  (one package)


def replace_weights(
    model: CompiledModule,
    weights: torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str] | Checkpoint,
    *,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    allow_cast: bool = False,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> ReplaceReport:
    """Replace the weights of a model, all or none, while it serves.

    Calls that are running finish on the old weights; calls that start afterwards use the new ones. Tensors in memory
    are copied, so that a later edit of them changes nothing here. A path is mapped, and tensors whose layout is the
    slot's are used where the file has them, after their CRC was compared: the file must not be truncated or
    overwritten while the model lives.

    Args:
        model: The model.
        weights: A module of the same architecture, a state_dict, a checkpoint file or an open checkpoint.
        top_level_key: Dotted path of the dict that holds the weights; for files.
        keys: Rules from keys to slot names; None means identical names.
        allow_cast: Convert between float dtypes, rounding to nearest even.
        allow_missing: Leave slots as they are for which there is no key.
        allow_unused: Leave out keys for which there is no slot.

    Raises:
        MismatchError: Something differs, is missing or left over. The old weights stay.
        FormatError: The file is damaged. The old weights stay.
        UnsupportedError: A tensor is of a kind that reweft does not read. The old weights stay.
        IoError: The file cannot be read. The old weights stay.
    """
    checkpoint = _checkpoint(model, weights, top_level_key)
    if keys is not None:
        checkpoint = checkpoint.rekey(keys)
    report = model._core.refit(  # noqa: SLF001  (one package)
        checkpoint._core,  # noqa: SLF001
        cast=allow_cast,
        missing=allow_missing,
        unused=allow_unused,
    )
    data = json.loads(report)
    return ReplaceReport(
        slots=data["slots"],
        kept=tuple(data["kept"]),
        nbytes=data["nbytes"],
        bytes_copied=data["nbytes_copied"],
        notices=tuple(data["notices"]),
    )


def _checkpoint(model: CompiledModule, weights: object, top_level_key: str | None) -> Checkpoint:
    if isinstance(weights, str | os.PathLike):
        return open_checkpoint(weights, top_level_key=top_level_key, mmap=True)
    if top_level_key is not None:
        raise UsageError("top_level_key is for checkpoint files")
    if isinstance(weights, Checkpoint):
        return weights
    if isinstance(weights, torch.nn.Module):
        return checkpoint_of(_module_tensors(model, weights), type(weights).__name__)
    if isinstance(weights, Mapping):
        return checkpoint_of(weights)
    raise UsageError(f"weights are a {type(weights).__name__}, wanted a module, a state_dict, a path or a Checkpoint")


def _module_tensors(model: CompiledModule, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's state_dict, and what of the model's slots is not in one: other buffers and tensor attributes.

    Raises:
        MismatchError: The module has no tensor for a slot that no state_dict would have.
    """
    state = dict(module.state_dict(keep_vars=True))
    held = dict(held_tensors(module))
    held.update(module.named_buffers(remove_duplicate=False))
    for names in model.slots():
        for name in names:
            value = held[name] if name in held else _attribute(module, name)
            if name not in state and value is not None:
                state[name] = value
        # Literals of `forward` are part of the program and not of the module.
        if names[0].startswith("lifted_tensor_") or any(name in state for name in names):
            continue
        raise MismatchError(
            f"{type(module).__name__}: {names[0]!r}: the module has no such tensor",
            key=names[0],
            hint="the model was compiled from a module of another architecture",
        )
    return state


def _attribute(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    owner, _, attribute = name.rpartition(".")
    try:
        value = getattr(module.get_submodule(owner), attribute, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None
