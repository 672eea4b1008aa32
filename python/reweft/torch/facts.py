"""What a module's program depends on: its parts, attributes and tensors, to be held against what they are later."""

from __future__ import annotations

import contextlib
import types
from typing import TYPE_CHECKING, Any

import torch

from reweft import _core
from reweft.torch.tensors import dtype_name, held_tensors, identity, is_plain_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Facts", "attribute_changes", "tensors_of", "watched"]

# What every module has and no forward reads, beside the dicts that are looked at by themselves.
_OF_ALL_MODULES = set(vars(torch.nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
# The dicts of a module whose contents decide what it computes.
_DICTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
# Objects in objects in an attribute, such as the parts of a configuration.
_DEPTH = 8


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a module under the path that export gives it."""
    found: dict[str, torch.Tensor] = dict(held_tensors(module))
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}.{name}" if prefix else name] = value
    found.update(module.named_buffers(remove_duplicate=False))
    found.update(module.named_parameters(remove_duplicate=False))
    return found


class Facts:
    """A module as it was."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._attributes = dict(_attributes(module))
        tensors = tensors_of(module)
        self._layouts = {path: _layout(value) for path, value in tensors.items()}
        self._ties = _ties(tensors)
        self._places = {path: (id(value), value.data_ptr()) for path, value in tensors.items() if _is_plain(value)}
        # An identity means something while the object lives.
        self._held = tensors

    def difference(self, other: Facts) -> str | None:
        """What another program is needed for, if anything; `other` is newer."""
        for kind in ("_attributes", "_layouts"):
            if (found := _difference(getattr(self, kind), getattr(other, kind))) is not None:
                return found
        return None if self._ties == other._ties else "other parameters share memory than before"

    def moved(self, other: Facts) -> str | None:
        """Which tensor is another one, or elsewhere."""
        moved = [path for path, place in other._places.items() if self._places.get(path) != place]
        if not moved:
            return None
        return f"{moved[0]} is another tensor" + (f", and {len(moved) - 1} more" if len(moved) > 1 else "")


@contextlib.contextmanager
def attribute_changes(module: torch.nn.Module) -> Iterator[list[str]]:
    """Find out what calls of a module change in its attributes; texts, in a list that is filled meanwhile.

    Export puts attributes back when it is done, so they are looked at when a call begins and when it ends.
    """
    changes: list[str] = []
    begun: list[dict[str, Any]] = []

    def values() -> dict[str, Any]:
        return {name: _values(fact) for name, fact in _attributes(module)}

    def begin(*_: Any) -> None:
        begun.append(values())

    def end(*_: Any) -> None:
        if (found := _difference(begun.pop(), values())) is not None:
            changes.append(found)

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


def watched(module: torch.nn.Module) -> _core.Watch:
    """What is looked at in each call: dicts and lists by the identity of what is in them, tensors by their address."""
    modules: list[dict[str, Any]] = []
    containers: list[dict[Any, Any] | list[Any]] = []
    seen: set[int] = set()
    for part in module.modules():
        own = vars(part)
        modules.append(own)
        looked_at = [own[name] for name in _DICTS if name in own]
        containers += looked_at
        seen.update(map(id, (own, *looked_at)))
        for name, value in own.items():
            if name not in _OF_ALL_MODULES:
                containers += _containers(value, seen, 0)
    skipped = _OF_ALL_MODULES - {"training"}
    return _core.Watch(
        modules, skipped, containers, [value for value in tensors_of(module).values() if _is_plain(value)]
    )


def _containers(value: Any, seen: set[int], depth: int) -> Iterator[dict[Any, Any] | list[Any]]:
    """The dicts and lists in a value, each once."""
    if id(value) in seen or depth > _DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, dict | list):
        yield value
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif _has_attributes(value):
        parts = (vars(value),)
    for part in parts:
        yield from _containers(part, seen, depth + 1)


def _values(fact: Any) -> Any:
    """Of a fact what is a value: export puts tensors of its own into a module, also into lists that refer to them."""
    match fact:
        case bool():
            return fact
        case (type(), str()):
            return fact
        case (_, list(parts)):
            return [(key, _values(part)) for key, part in parts]
        case _:
            return None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for name in [*old, *(name for name in new if name not in old)]:
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if before != now:
            return f"{name} is {_shown(now)}, was {_shown(before)}"
    return None


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    paths: dict[int, str] = {}
    seen: set[int] = set()
    for path, part in module.named_modules(remove_duplicate=False):
        where = path or "the module"
        if id(part) in paths:
            yield where, ("part", paths[id(part)])
            continue
        paths[id(part)] = where
        yield where, type(part)
        own = vars(part)
        yield f"{where}.training", part.training
        for name in _DICTS:
            if "hooks" in name:
                yield f"{where}.{name}", _fact(own.get(name), seen, 0)
            else:
                yield f"{where}.{name}", [(key, value is None) for key, value in own.get(name, {}).items()]
        for name, value in own.items():
            if name not in _OF_ALL_MODULES:
                yield f"{where}.{name}", _fact(value, seen, 0)


class _Object:
    """Something that is itself or another; holds it, so that its address stays its own."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)

    def __repr__(self) -> str:
        return f"another {type(self._value).__name__}"


def _fact(value: Any, seen: set[int], depth: int) -> Any:
    """A value that can be compared with a later one. What is in several places is looked into in the first."""
    if isinstance(value, torch.Tensor | torch.nn.Module):
        # Tensors and modules are compared by themselves.
        return type(value)
    if isinstance(value, _PLAIN):
        # nan is not equal to itself, -0.0 and 0.0 are equal, and 1 is True.
        return type(value), repr(value)
    if id(value) in seen or depth > _DEPTH:
        return _Object(value)
    seen.add(id(value))
    parts: Iterable[tuple[object, Any]] = ()
    if isinstance(value, list | tuple):
        parts = enumerate(value)
    elif isinstance(value, dict):
        parts = value.items()
    elif _has_attributes(value):
        parts = vars(value).items()
    else:
        return _Object(value)
    # One list is as good as another with the same in it; of objects nobody knows that.
    kind = type(value) if isinstance(value, list | tuple | dict) else _Object(value)
    return kind, [(repr(key), _fact(part, seen, depth + 1)) for key, part in parts]


def _has_attributes(value: Any) -> bool:
    """Whether it is a plain object: one with attributes, and no class, function, module or tensor."""
    kinds = (type, types.ModuleType, types.FunctionType, types.MethodType, torch.Tensor, torch.nn.Module)
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, kinds)


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    if not _is_plain(value):
        return (type(value).__name__, dtype_name(value.dtype), str(value.device))
    flags = (value.is_conj(), value.is_neg())
    return (dtype_name(value.dtype), tuple(value.shape), value.stride(), str(value.device), *flags)


def _is_plain(value: torch.Tensor) -> bool:
    """Whether its bytes are all there is to it."""
    return is_plain_type(type(value)) and value.layout is torch.strided and value.is_cpu


def _ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for path, value in tensors.items():
        if _is_plain(value):
            groups.setdefault(identity(path, value), []).append(path)
    return [names for names in groups.values() if len(names) > 1]


def _shown(value: Any) -> str:
    match value:
        case (type(), str(text)):
            return text
        case _:
            return str(value)
