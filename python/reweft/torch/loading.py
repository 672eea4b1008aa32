"""New weights for a module that lives: `load_into`.

What is checked and which way the bytes take is decided here. How a module looks before, and how it is put back, is in
`undoing`.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from reweft.checkpoint import Checkpoint
from reweft.checkpoint import open as open_checkpoint
from reweft.errors import FormatError, MismatchError, ReweftError, UnsupportedError, UsageError
from reweft.torch.kinds import (
    describe,
    handles_loading,
    is_bytes,
    is_dense_bytes,
    is_tensor,
    kind_of,
    overlaps,
    same_bytes,
)
from reweft.torch.tensors import checkpoint_of, dtype_of, is_plain_type, mapped_tensors
from reweft.torch.undoing import Undo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from reweft.checkpoint import TensorInfo
    from reweft.keymap import KeyMap

__all__ = ["IncompatibleKeys", "ModuleWeights", "load_into"]

Mode: TypeAlias = Literal["copy", "assign", "swap"]
ModuleWeights: TypeAlias = str | os.PathLike[str] | Checkpoint | Mapping[str, Any]
"""What a module's weights may come from: a file, an open checkpoint, or a state_dict."""

_EXTRA = "_extra_state"
_Error = TypeVar("_Error", bound=ReweftError)


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` gives too: names that did not find each other."""

    missing_keys: list[str]
    """Names of the module that the source does not have; they keep their values."""
    unexpected_keys: list[str]
    """Keys of the source that the module does not have."""


def load_into(
    module: torch.nn.Module,
    source: ModuleWeights,
    *,
    mode: Mode = "copy",
    strict: bool = True,
    keys: KeyMap | None = None,
    allow_cast: bool = False,
    top_level_key: str | None = None,
) -> IncompatibleKeys:
    """Put new weights into a module, all or none of them, with everything that `module.load_state_dict` does.

    Names, shapes, dtypes, devices and CRCs are compared before anything changes. What still fails later, in a hook, a
    tensor subclass or a module with loading code of its own, is undone: values, objects, buffers and extra state are
    then what they were.

    **copy** writes into the memory of the parameters, so that whoever holds them sees the new values: optimizers, DDP,
    compiled functions, CUDA graphs. A file is read straight into it, on several threads, without the interpreter lock
    and with no copy between; extra memory is needed only for tensors that are laid out in another way than in the file.
    A module with hooks or loading code of its own goes through `load_state_dict` on a mapping of the file, and takes
    its own size of memory for the undoing.

    **assign** makes the checkpoint's tensors the parameters, for modules built on the meta device. A file is mapped and
    no byte copied; what is written to a parameter later stays in this process. So the file must not be truncated or
    overwritten while the module lives; replacing it by a rename is safe. Tied parameters stay one object. Optimizers
    must be made afterwards.

    **swap** does the same and keeps the parameter objects, through `torch.utils.swap_tensors`: each gets what
    `Tensor.module_load(parameter, new, assign=True)` gives, for which tensor subclasses on either side may have a
    handler. torch swaps no tensor that something holds in a way it cannot follow: by weak references (as `nn.LSTM`,
    `GRU`, `RNN` and compiled functions do) or as the base of a view. A backward pass through the old values fails
    afterwards, and `.grad` is gone, as with `load_state_dict`. While it lasts, torch's process-wide switch for swapping
    is on, so other threads should convert no modules.

    Buffers that are not persistent are in no state_dict and are never loaded. A name that is not in the source is not
    missing if the same parameter is there under another name.

    Args:
        module: The module.
        source: A file, an open checkpoint, or a state_dict. Nothing in a file is run.
        mode: How the weights get there.
        strict: If True, a name without a key or a key without a name is an error. If False, they are in the result.
        keys: Rules from keys to names; None means identical names. The versions of a state_dict (`_metadata`) are left
            out then, and extra state that is no tensor is missing.
        allow_cast: Convert between float dtypes, rounding to nearest even.
        top_level_key: Dotted path of the dict that holds the weights; for files.

    Returns:
        The names that did not find each other.

    Raises:
        MismatchError: Names, shapes or dtypes do not fit, or names that share memory get different values.
        UnsupportedError: A tensor is of a kind that cannot be loaded so: a subclass without a handler (DTensor gets no
            plain tensor), one that cannot be swapped, a parameter on the meta device in copy mode. Or a file has extra
            state with tensors in it, or of classes that are not Python's own. The message says why.
        UsageError: The arguments contradict each other.
        FormatError: The file is damaged, or a CRC is wrong.
        IoError: The file cannot be read. If it was changed while the bytes moved, or the disk failed then, the message
            says that some tensors have new bytes already; nothing else leaves a module half loaded.

        What a hook raises is raised as it is.

    Warns:
        UserWarning: After assign or swap, something is still on the meta device; the warning names it.

    Example:
        >>> load_into(net, "epoch3.safetensors")  # doctest: +SKIP
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """
    if mode not in {"copy", "assign", "swap"}:
        raise UsageError(f'mode is {mode!r}, wanted "copy", "assign" or "swap"')
    load = _Load(module, _weights(source, keys, top_level_key), mode, allow_cast=allow_cast)
    load.check(strict=strict)
    return load.fill() if load.can_fill() else load.through_module(strict=strict)


class _Found(NamedTuple):
    """A tensor of the source."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    info: TensorInfo | None
    """For what is in a file."""
    value: Any
    """For what is in memory."""


class _Weights:
    """The source: names and tensors, whatever it is."""

    def __init__(self, name: str, values: Mapping[str, Any], checkpoint: Checkpoint | None) -> None:
        self.name = name
        self.checkpoint = checkpoint
        # Of a checkpoint the key that a name stands for, else the value itself.
        self.values = dict(values)
        self.extra_states: dict[str, Any] = {}
        """What a file has for modules beside tensors."""
        self._metadata = getattr(values, "_metadata", None)

    @cached_property
    def metadata(self) -> Any:
        """`_metadata` of the state_dict, which has the versions of modules; None if there is none.

        Raises:
            FormatError: The file has something else under that name.
        """
        if self.checkpoint is None:
            return self._metadata
        found = self.checkpoint._core.state_metadata()  # noqa: SLF001  (one package)
        if found is not None and not (isinstance(found, dict) and all(isinstance(v, dict) for v in found.values())):
            raise self.error(FormatError, "_metadata", "not a dict of dicts, as state_dict() makes it")
        return found

    def read_extra_states(self, names: Iterable[str]) -> None:
        """Read what a file has for modules beside tensors, without running anything.

        Raises:
            UnsupportedError: It is more than plain data.
        """
        checkpoint = self.checkpoint
        # A key map renames tensors only, so whose state it is would be a guess.
        if checkpoint is None or checkpoint.key_report is not None:
            return
        paths = [path for path in (*checkpoint.non_tensors, *self.values) if _EXTRA in path]
        held = {path.partition(_EXTRA)[0] + _EXTRA for path in paths}
        for name in names:
            if name in held and name not in self.values:
                try:
                    self.extra_states[name] = checkpoint._core.value(name)  # noqa: SLF001
                except UnsupportedError as error:
                    what = "extra state that is more than plain data, which is not read from this file"
                    raise self.error(UnsupportedError, name, what, "pass a state_dict") from error

    def find(self, name: str) -> _Found | None:
        """The tensor of a name; None if there is none.

        Raises:
            MismatchError: There is something else.
        """
        if name not in self.values:
            return None
        value = self.values[name]
        if self.checkpoint is not None:
            info = self.checkpoint[value]
            return _Found(dtype_of(info), info.shape, info, None)
        if not is_tensor(value):
            raise self.error(MismatchError, name, f"a {type(value).__name__}, wanted a tensor")
        return _Found(value.dtype, tuple(value.shape), None, value)

    def tensors(self, names: Iterable[str]) -> dict[str, Any]:
        """What names stand for; tensors of a file are mapped."""
        wanted = {name: self.values[name] for name in names if name in self.values}
        if self.checkpoint is None:
            return wanted
        infos = {key: self.checkpoint[key] for key in wanted.values()}
        mapped = mapped_tensors(infos.values())
        return {name: mapped[key] for name, key in wanted.items()}

    def error(self, kind: type[_Error], name: str, what: str, hint: str | None = None) -> _Error:
        """An error that says where it is."""
        error = kind(f"{self.name}: {name!r}: {what}", key=name, hint=hint)
        error.path = None if self.checkpoint is None else self.checkpoint.path
        return error


def _weights(source: ModuleWeights, keys: KeyMap | None, top_level_key: str | None) -> _Weights:
    """See a source as names and tensors. Reads metadata only.

    Raises:
        UsageError: It is none of those that are known.
    """
    if isinstance(source, str | os.PathLike):
        # The key map may name a top-level key, so it is there when the file is opened.
        source, keys = open_checkpoint(source, top_level_key=top_level_key, keys=keys), None
    elif top_level_key is not None:
        raise UsageError("top_level_key is for checkpoint files")
    elif isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        if keys is None:
            return _Weights("state_dict", source, None)
        source = checkpoint_of(cast("Mapping[str, Any]", source))
    if isinstance(source, Checkpoint):
        opened = source if keys is None else source.rekey(keys)
        return _Weights(str(opened.path), {key: key for key in opened}, opened)
    raise UsageError(f"source is a {type(source).__name__}, wanted a path, a Checkpoint or a state_dict")


@dataclass(frozen=True, eq=False)
class _Place:
    """A parameter or persistent buffer, under one of its names."""

    name: str
    module: torch.nn.Module
    attribute: str
    tensor: torch.Tensor
    is_own: bool
    """Whether loading code of the module, or of one around it, decides what becomes of the name."""

    @property
    def is_absent_in_old_files(self) -> bool:
        """Whether `load_state_dict` gives it a value where a checkpoint is too old to have it."""
        return self.attribute == "num_batches_tracked" and isinstance(self.module, _NormBase)

    @property
    def holder(self) -> dict[str, Any]:
        """Where the module has it."""
        parameters: dict[str, Any] = self.module._parameters  # noqa: SLF001
        return parameters if self.attribute in parameters else self.module._buffers  # noqa: SLF001

    def current(self) -> torch.Tensor | None:
        """What is there now."""
        found: torch.Tensor | None = self.holder.get(self.attribute)
        return found


def _places(module: torch.nn.Module, prefix: str = "", *, is_own: bool = False) -> Iterator[_Place]:
    """All names that `load_state_dict` looks for, in its order."""
    is_own = is_own or _renames(module)
    persistent = {n: v for n, v in module._buffers.items() if n not in module._non_persistent_buffers_set}  # noqa: SLF001
    for name, tensor in {**module._parameters, **persistent}.items():  # noqa: SLF001
        if tensor is not None:
            yield _Place(prefix + name, module, name, tensor, is_own)
    for name, child in module._modules.items():  # noqa: SLF001
        if child is not None:
            yield from _places(child, f"{prefix}{name}.", is_own=is_own)


def _renames(module: torch.nn.Module) -> bool:
    """Whether code of the module's own decides which key becomes what."""
    loader = getattr(module._load_from_state_dict, "__func__", None)  # noqa: SLF001
    known = {torch.nn.Module._load_from_state_dict, _NormBase._load_from_state_dict}  # noqa: SLF001
    return bool(module._load_state_dict_pre_hooks) or loader not in known  # noqa: SLF001


def _runs_code(module: torch.nn.Module) -> bool:
    """Whether loading runs code that is not torch's own for plain modules."""
    return _renames(module) or bool(module._load_state_dict_post_hooks) or _has_extra(module)  # noqa: SLF001


def _has_extra(module: torch.nn.Module) -> bool:
    return type(module).set_extra_state is not torch.nn.Module.set_extra_state


def _same_window(left: _Found, right: _Found) -> bool:
    """Whether two keys are the same elements of the same memory, so that their values cannot differ."""
    if left.info is None or right.info is None:
        return left.value is right.value
    one, other = left.info, right.info
    return (one.storage, one.storage_offset, one.strides, one.shape, one.dtype) == (
        (other.storage, other.storage_offset, other.strides, other.shape, other.dtype)
    )


class _NoSilentCast(TorchFunctionMode):
    """Sees every copy into a module's tensors that loading code makes, and refuses those that would convert."""

    def __init__(self, load: _Load) -> None:
        super().__init__()
        self.load = load
        # What a handler of a subclass does with its parameter is the handler's affair.
        watched = load.places if load.mode == "copy" else []
        self.targets = {id(place.tensor): place.name for place in watched}
        self.refused: ReweftError | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.Tensor.copy_ and len(args) > 1 and id(args[0]) in self.targets:
            target, value = args[:2]
            if is_tensor(value) and not self.load.fits(value.dtype, target.dtype):
                name, found = self.targets[id(target)], _Found(value.dtype, tuple(value.shape), None, value)
                self.refused = self.refused or self.load.misfit(name, found, target)
                raise self.refused
        return func(*args, **(kwargs or {}))


@contextmanager
def _swapping(*, on: bool) -> Iterator[None]:
    """Say how `load_state_dict` puts values in place. torch keeps that for the whole process."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(on)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class _Load:
    """One call: what is to go where."""

    def __init__(self, module: torch.nn.Module, weights: _Weights, mode: Mode, *, allow_cast: bool) -> None:
        self.module = module
        self.weights = weights
        self.mode = mode
        self.allow_cast = allow_cast
        self.places = list(_places(module))
        self.tensors = {place.name: place.tensor for place in self.places}
        self.parts = list(module.modules())
        # With loading code of its own a module alone knows which names it takes.
        self.is_own = any(map(_renames, self.parts))
        self.found: dict[str, _Found] = {}
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.overlapping: set[str] = set()
        """Names whose memory may be written under another name too."""
        self.aliased: set[str] = set()
        """Names whose new value may lie in the module's own memory."""

    # Checks, which change nothing.

    def check(self, *, strict: bool) -> None:
        """Hold names, shapes, dtypes, devices and kinds against each other.

        Raises:
            MismatchError: Something does not fit.
            UnsupportedError: Something cannot be loaded in this mode.
        """
        self.weights.read_extra_states(name for part, name in self._extra_names() if _has_extra(part))
        groups = self._groups()
        for group in groups:
            self._complete(group)
        if not self.is_own:
            self._check_names(strict=strict)
        for place in self.places:
            # Loading code may make what it likes of a value; but FSDP keeps tensors where no undoing reaches them.
            is_sharded = place.is_own and kind_of(place.tensor) == "DTensor"
            found = None if place.is_own and not is_sharded else self.weights.find(place.name)
            if found is not None and is_sharded:
                if (other := self._other_kind(place, found)) is not None:
                    raise other
            elif found is not None:
                self._check_place(place, found)
                self.found[place.name] = found
        for group in groups:
            self._check_tied([place.name for place in group if place.name in self.found])
        targets = {place.name: place.tensor for place in self.places if is_bytes(place.tensor)}
        values = {name: found.value for name, found in self.found.items() if found.value is not None}
        values = {name: value for name, value in values.items() if is_bytes(value)}
        self.overlapping, self.aliased = overlaps(targets, values)
        self.overlapping |= {name for name, tensor in targets.items() if torch._debug_has_internal_overlap(tensor)}  # noqa: SLF001

    def _groups(self) -> list[list[_Place]]:
        """Places of one tensor together."""
        groups: dict[int, list[_Place]] = {}
        for place in self.places:
            groups.setdefault(id(place.tensor), []).append(place)
        return [group for group in groups.values() if len(group) > 1]

    def _complete(self, group: list[_Place]) -> None:
        """Let tied names that the source lacks stand for what it has under another one."""
        names = [place.name for place in group if not place.is_own]
        there = next((name for name in names if name in self.weights.values), None)
        if there is not None:
            for name in names:
                self.weights.values.setdefault(name, self.weights.values[there])

    def _check_names(self, *, strict: bool) -> None:
        extra = [name for part, name in self._extra_names() if _has_extra(part)]
        values: Mapping[str, Any] = {**self.weights.values, **self.weights.extra_states}
        counts = {place.name for place in self.places if place.is_absent_in_old_files}
        absent = counts - values.keys()
        if absent != counts and self.weights.metadata is None:
            # Whoever wrote it knew these names, so one that is not there was left out.
            absent = set()
        wanted = [*(place.name for place in self.places), *extra]
        self.missing = [name for name in wanted if name not in values and name not in absent]
        known = set(wanted)
        self.unexpected = [key for key in values if key not in known]
        if not strict or not (self.missing or self.unexpected):
            return
        lists = (("missing", self.missing), ("unexpected", self.unexpected))
        what = "; ".join(f"{kind} keys: {', '.join(names)}" for kind, names in lists if names)
        objects = {} if self.weights.checkpoint is None else self.weights.checkpoint.non_tensors
        hint = "rename keys with keys=, or pass strict=False"
        if any(name in objects for name in extra):
            hint = "the file has extra state that is no tensor, which a key map does not rename: pass a state_dict"
        name = (self.missing or self.unexpected)[0]
        error = MismatchError(f"{self.weights.name}: {type(self.module).__name__}: {what}", key=name, hint=hint)
        error.path = None if self.weights.checkpoint is None else self.weights.checkpoint.path
        raise error

    def _extra_names(self) -> list[tuple[torch.nn.Module, str]]:
        named = self.module.named_modules(remove_duplicate=False)
        return [(part, f"{prefix}.{_EXTRA}" if prefix else _EXTRA) for prefix, part in named]

    def _check_place(self, place: _Place, found: _Found) -> None:
        refuse, tensor = self.weights.error, place.tensor
        if found.shape != tuple(tensor.shape) and (tensor.dim(), found.shape) != (0, (1,)):
            raise self.misfit(place.name, found, tensor)
        is_handled = self.mode == "swap" and (handles_loading(tensor) or handles_loading(found.value))
        if not is_handled:
            self._check_kind(place, found)
            if not self.fits(found.dtype, tensor.dtype):
                raise self.misfit(place.name, found, tensor)
        if self.mode == "copy" and tensor.is_meta:
            hint = 'load with mode="assign", or give the module memory with module.to_empty(device="cpu")'
            raise refuse(UnsupportedError, place.name, "the parameter is on the meta device and has no memory", hint)
        if self.mode == "copy" and is_plain_type(type(tensor)) and torch._debug_has_internal_overlap(tensor) == 1:  # noqa: SLF001
            hint = "give the module a tensor of its own: tensor.clone()"
            raise refuse(UnsupportedError, place.name, "elements of the parameter share memory (expand)", hint)
        if self.mode == "swap" and (reason := _unswappable(place)):
            raise refuse(UnsupportedError, place.name, f"cannot be swapped: {reason}", 'load with mode="copy"')

    def _check_kind(self, place: _Place, found: _Found) -> None:
        """Refuse what would replace one kind of tensor by another, or convert between them without a word."""
        refuse, tensor = self.weights.error, place.tensor
        value = found.value if found.info is None else None
        if (other := self._other_kind(place, found)) is not None:
            raise other
        exact = type(tensor) if not is_plain_type(type(tensor)) else None
        if self.mode != "copy" and exact is not None and (value is None or type(value) is not exact):
            what = f"the parameter is a {exact.__name__}, which a plain tensor would replace"
            raise refuse(UnsupportedError, place.name, what, 'load with mode="copy"')
        source = torch.device("cpu") if value is None else value.device
        if self.mode != "copy" and not tensor.is_meta and tensor.device != source:
            what = f"found a tensor on {source}, wanted {tensor.device}"
            raise refuse(MismatchError, place.name, what, 'load with mode="copy", or move the tensors first')
        inference = tensor.is_inference() or (self.mode != "copy" and value is not None and value.is_inference())
        if inference and not torch.is_inference_mode_enabled():
            what = "a tensor of inference mode cannot be loaded outside of it"
            raise refuse(UnsupportedError, place.name, what, "clone() it, or load in torch.inference_mode()")

    def _other_kind(self, place: _Place, found: _Found) -> UnsupportedError | None:
        """The error that a value is of another kind than the parameter."""
        kinds = "Tensor" if found.info is not None else kind_of(found.value), kind_of(place.tensor)
        if kinds[0] == kinds[1]:
            return None
        hint = "distribute or quantise the state_dict in the same way"
        hint += ', or give one of the classes a handler of Tensor.module_load and load with mode="swap"'
        return self.weights.error(UnsupportedError, place.name, f"found a {kinds[0]}, wanted a {kinds[1]}", hint)

    def fits(self, found: torch.dtype, wanted: torch.dtype) -> bool:
        """Whether elements may be taken for those of another dtype."""
        return found == wanted or (self.allow_cast and found.is_floating_point and wanted.is_floating_point)

    def misfit(self, name: str, found: _Found, wanted: torch.Tensor) -> MismatchError:
        """The error that shape or dtype differ."""
        both_float = found.dtype.is_floating_point and wanted.dtype.is_floating_point
        same_shape = found.shape == tuple(wanted.shape)
        hint = "pass allow_cast=True to convert" if same_shape and both_float else None
        what = f"found {describe(found.dtype, found.shape)}, wanted {describe(wanted.dtype, wanted.shape)}"
        return self.weights.error(MismatchError, name, what, hint)

    def _check_tied(self, names: list[str]) -> None:
        for name in names[1:]:
            if not _same_window(self.found[names[0]], self.found[name]):
                one, other = self.weights.tensors([names[0], name]).values()
                if not same_bytes(one, other):
                    what = f"tied to {names[0]!r} in the module, and another value in the source"
                    raise self.weights.error(MismatchError, name, what, "untie them in the module, or drop one key")

    # The short way: the engine reads into the parameters.

    def can_fill(self) -> bool:
        """Whether reading bytes into the parameters is all that `load_state_dict` would do."""
        loader = type(self.module).load_state_dict
        return (
            self.mode == "copy"
            and loader is torch.nn.Module.load_state_dict
            and "load_state_dict" not in vars(self.module)
            and not any(map(_runs_code, self.parts))
            and not any(place.is_absent_in_old_files and place.name not in self.found for place in self.places)
            and not (self.overlapping or self.aliased)
            and (self.weights.checkpoint is None or self.weights.checkpoint.format != "memory")
            and all(is_dense_bytes(self.tensors[name]) for name in self.found)
            and all(is_bytes(found.value) for found in self.found.values() if found.info is None)
            # Whoever listens to torch's functions hears nothing of this way.
            and not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())  # noqa: SLF001
        )

    def fill(self) -> IncompatibleKeys:
        """Read into the memory that the parameters have."""
        names = list({id(self.tensors[name]): name for name in self.found}.values())
        tensors = [self.tensors[name] for name in names]
        # Files of 2017 have one dimension where tensors have none since.
        rooms = [
            tensor.detach().view(self.found[name].shape) if tensor.dim() == 0 else tensor
            for name, tensor in zip(names, tensors, strict=True)
        ]
        checkpoint = self.weights.checkpoint
        keys = [self.weights.values[name] for name in names] if checkpoint is not None else names
        if checkpoint is None:
            checkpoint = checkpoint_of({name: self.found[name].value for name in names}, self.weights.name)
        try:
            checkpoint._core.fill(keys, rooms, cast=self.allow_cast)  # noqa: SLF001  (one package)
        finally:
            # A backward pass that saved the old values must not take the new ones for them.
            torch.autograd.graph.increment_version(tensors)
        return IncompatibleKeys(self.missing, self.unexpected)

    # The long way: the module loads itself, and is put back if that fails.

    def through_module(self, *, strict: bool) -> IncompatibleKeys:
        """Let `load_state_dict` do it.

        Raises:
            MismatchError: It refuses the state_dict.
        """
        state = self._state()
        is_copy = self.mode == "copy"
        undo = Undo(self.module, values=is_copy or self._runs_code(), needed=is_copy)
        watch = _NoSilentCast(self)
        try:
            with _swapping(on=self.mode == "swap"), watch:
                result = self.module.load_state_dict(state, strict=strict, assign=self.mode != "copy")
            self._finish(state)
        except BaseException as error:
            undo.restore()
            reason = watch.refused or self._reason(error)
            if reason is None:
                raise
            raise reason from error
        self._warn_of_meta()
        return IncompatibleKeys(list(result.missing_keys), list(result.unexpected_keys))

    def _reason(self, error: BaseException) -> ReweftError | None:
        """What an error of loading code means, if it is not the caller's own."""
        if isinstance(error, ReweftError) or not isinstance(error, Exception):
            return None
        for place in self.places:
            # What came under the name may not be what loading code made of it, so it was not refused before.
            found = self.weights.find(place.name) if place.is_own and not is_lazy(place.tensor) else None
            if found is not None and (other := self._other_kind(place, found)) is not None:
                return other
        if type(error) is RuntimeError and str(error).startswith("Error(s) in loading state_dict"):
            return MismatchError(f"{self.weights.name}: {error}")
        return None

    def _runs_code(self) -> bool:
        handled = (handles_loading(place.tensor) for place in self.places)
        return any(map(_runs_code, self.parts)) or any(handled)

    def _state(self) -> OrderedDict[str, Any]:
        """What `load_state_dict` gets: tensors over the mapped file, or those in memory."""
        weights = self.weights
        wanted: Iterable[str] = weights.values
        if weights.checkpoint is not None:
            unreadable = weights.checkpoint.unreadable
            extra = {name for _, name in self._extra_names()}
            wanted = [n for n, key in weights.values.items() if key not in unreadable and self._is_wanted(n, extra)]
        found = weights.tensors(wanted)
        if self.mode == "copy":
            # Copies of tensors that an earlier copy would overwrite.
            found.update({name: found[name].clone() for name in self.aliased})
        else:
            found.update({name: self._cast(name, found[name]) for name in self.found})
        # Of keys that nobody asks for it hears the names alone.
        state = OrderedDict((name, found.get(name, torch.empty(0))) for name in weights.values)
        state.update(weights.extra_states)
        if weights.metadata is not None:
            state._metadata = weights.metadata  # type: ignore[attr-defined]  # noqa: SLF001  (torch's own way)
        return state

    def _is_wanted(self, name: str, extra: set[str]) -> bool:
        return self.is_own or name in self.found or name in extra

    def _cast(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A value as it becomes a parameter: an object of its own, of the dtype that is asked for."""
        wanted = self.tensors[name]
        if self.mode == "swap" and (handles_loading(wanted) or handles_loading(value)):
            return value
        return value.detach().to(wanted.dtype)

    def _finish(self, state: Mapping[str, Any]) -> None:
        """What `load_state_dict` leaves undone: ties, and a look at what became of everything.

        Raises:
            MismatchError: A tensor is not what it was asked to be.
        """
        for name in self.overlapping & self.found.keys():
            tensor = self.tensors[name]
            value = state[name].to(tensor.dtype).reshape(tensor.shape)
            if not same_bytes(tensor, value):
                what = "its memory is that of another name too, whose value in the source is another"
                raise self.weights.error(MismatchError, name, what)
        if self.mode == "assign":
            for group in self._groups():
                for place in group[1:]:
                    place.holder[place.attribute] = group[0].current()
        if self.mode != "copy":
            for place in self.places:
                self._check_result(place)

    def _check_result(self, place: _Place) -> None:
        """Hold what loading code made of a parameter against what it was; all other was checked before."""
        now, before = place.current(), place.tensor
        if not place.is_own or now is None or now is before or is_lazy(before):
            return
        if (type(now), now.dtype, now.shape) != (type(before), before.dtype, before.shape):
            what = f"loading made a {type(now).__name__} {describe(now.dtype, now.shape)} of a "
            what += f"{type(before).__name__} {describe(before.dtype, before.shape)}"
            raise self.weights.error(MismatchError, place.name, what, 'load with mode="copy"')

    def _warn_of_meta(self) -> None:
        held = [*self.module.named_parameters(), *self.module.named_buffers()]
        names = [name for name, tensor in held if tensor.is_meta]
        if self.mode != "copy" and names:
            what = f"still on the meta device, because no key gives it a value: {', '.join(names)}"
            warnings.warn(f"{self.weights.name}: {what}; compute it before the module is used", stacklevel=4)


def _unswappable(place: _Place) -> str | None:
    """Why torch would refuse to swap a tensor, if it would."""
    tensor = place.tensor
    if weakref.getweakrefs(tensor):
        who = (
            f"{type(place.module).__name__} keeps" if isinstance(place.module, torch.nn.RNNBase) else "something keeps"
        )
        return f"{who} weak references to it"
    if tensor._use_count() == 1:  # noqa: SLF001
        return None
    if tensor.is_leaf and tensor.requires_grad:
        # Held for as long as the question takes; the edge of a graph that is alive is there already.
        _edge = torch.autograd.graph.get_gradient_edge(tensor)
        if tensor._use_count() <= 2:  # noqa: SLF001, PLR2004
            return None
    return "a view of it is alive, or something else of torch holds it"
