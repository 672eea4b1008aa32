"""Plain data into dataclasses and other annotated types; whatever does not fit is an error with its path."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import enum
import math
import sys
import types
import typing
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
)
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin

import numpy as np

from reweft._config_values import ConfigDict, ConfigName, ConfigObject
from reweft.errors import LimitError, MismatchError, UsageError

if TYPE_CHECKING:
    import os

MAX_DEPTH = 128
"""Levels of a type that holds itself."""
MAX_VALUES = 10_000_000
"""Values that shared containers may come to."""
MAX_SHOWN = 60
"""Characters of a value in a message."""

SEQUENCES = {list, tuple, collections.deque, Sequence, MutableSequence, Collection, Iterable}
SETS: dict[type[Any], type[Any]] = {set: set, frozenset: frozenset, AbstractSet: set, MutableSet: set}
DICTS = {dict, Mapping, MutableMapping, collections.OrderedDict, collections.defaultdict, collections.Counter}
EXACT_FLOATS = (np.float16, np.float32, np.float64)
NUMBERS: dict[type[Any], tuple[Any, Callable[[Any], Any] | None]] = {
    bool: ((bool, np.bool_), bool),
    int: ((int, np.integer), int),
    complex: ((complex, np.complex64, np.complex128), complex),
    str: ((str, ConfigName), str),
}
"""What may stand for a type, and how it becomes one."""


def fit(value: Any, kind: Any, path: str | os.PathLike[str], top_level_key: str | None) -> Any:
    """Make `kind` of a config; see `reweft.load_config`."""
    return _Fit(Path(path)).make(value, kind, _Place(top_level_key or "", 0))


def _name(kind: Any) -> str:
    return kind.__qualname__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)


def _shown(value: Any) -> str:
    """The type of a value, and the value itself if it is short."""
    name = type(value).__name__
    # Python refuses to print very long ints.
    short = abs(value) < 10**MAX_SHOWN if isinstance(value, int) else isinstance(value, float)
    short = short or (isinstance(value, str) and len(value) <= MAX_SHOWN)
    return f"{name} {value!r}" if short else name


class _Place(NamedTuple):
    """Where a value stands."""

    path: str
    depth: int

    def below(self, name: object) -> _Place:
        return _Place(f"{self.path}.{name}" if self.path else str(name), self.depth + 1)


class _Kind(NamedTuple):
    """A class with its arguments, and both as they were written."""

    cls: type[Any]
    args: tuple[Any, ...]
    whole: Any


class _Fit:
    """One conversion: the file for messages, and what it may still cost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = 0
        self.hints: dict[type[Any], dict[str, Any]] = {}

    def error(self, where: _Place, what: str, hint: str | None = None) -> MismatchError:
        place = f'"{where.path}": ' if where.path else ""
        error = MismatchError(f"{self.path}: {place}{what}", key=where.path or None, hint=hint)
        error.path = self.path
        return error

    def misfit(self, value: Any, kind: Any, where: _Place) -> MismatchError:
        return self.error(where, f"{_shown(value)}, wanted {_name(kind)}")

    def make(self, value: Any, kind: Any, where: _Place) -> Any:
        self.values += 1
        if where.depth > MAX_DEPTH or self.values > MAX_VALUES:
            deep = where.depth > MAX_DEPTH
            what = f"nested deeper than {MAX_DEPTH} levels" if deep else f"more than {MAX_VALUES} values"
            raise LimitError(f"{self.path}: {where.path}: {what}", key=where.path)
        while hasattr(kind, "__supertype__"):
            kind = kind.__supertype__
        origin, args = get_origin(kind), get_args(kind)
        if origin is typing.Annotated:
            return self.make(value, args[0], where)
        if kind is Any or kind is object:
            return value
        if origin in {Union, types.UnionType}:
            return self.union(value, kind, where)
        if kind is None or origin is typing.Literal:
            choices = args or (None,)
            if any(type(value) is type(choice) and value == choice for choice in choices):
                return value
            raise self.misfit(value, kind, where)
        if not isinstance(origin or kind, type):
            raise UsageError(f"load_config makes no {kind!r}", key=where.path)
        return self.of_class(value, _Kind(origin or kind, args, kind), where)

    def union(self, value: Any, kind: Any, where: _Place) -> Any:
        members = get_args(kind)
        if type(value) in members:
            return value
        candidates = [member for member in members if member is not types.NoneType]
        if len(candidates) == 1:
            return self.make(value, candidates[0], where)
        for member in candidates:
            try:
                return self.make(value, member, where)
            except MismatchError:
                continue
        raise self.misfit(value, kind, where)

    def of_class(self, value: Any, kind: _Kind, where: _Place) -> Any:
        cls = kind.cls
        make: Callable[[Any, _Kind, _Place], Any] = self.scalar
        if dataclasses.is_dataclass(cls) and cls not in {ConfigObject, ConfigName}:
            make = self.structure
        elif typing.is_typeddict(cls):
            make = self.typed_dict
        elif cls in SEQUENCES or cls in SETS:
            make = self.items
        elif cls in DICTS:
            make = self.mapping
        elif issubclass(cls, enum.Enum):
            make = self.member
        elif cls.__module__ == "torch" or cls.__module__.startswith("torch."):
            make = self.of_torch
        elif cls is np.ndarray:
            make = self.array
        return make(value, kind, where)

    def scalar(self, value: Any, kind: _Kind, where: _Place) -> Any:
        cls = kind.cls
        if cls is float:
            return self.floating(value, where)
        accepted, convert = NUMBERS.get(cls, (cls, None))
        if not isinstance(value, accepted) or (isinstance(value, bool) and cls is int):
            raise self.misfit(value, kind.whole, where)
        return value if convert is None or type(value) is cls else convert(value)

    def floating(self, value: Any, where: _Place) -> Any:
        if isinstance(value, (float, *EXACT_FLOATS)):
            return float(value)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise self.misfit(value, float, where)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        # An infinite float equals no int.
        if number == int(value):
            return number
        raise self.error(where, f"{_shown(value)}, which no float equals")

    def items(self, value: Any, kind: _Kind, where: _Place) -> Any:
        cls, args = kind.cls, kind.args
        wanted = (set, frozenset) if cls in SETS else (list, tuple)
        if type(value) not in ((collections.deque,) if cls is collections.deque else wanted):
            raise self.misfit(value, kind.whole, where)
        kinds: Sequence[Any] = [args[0] if args else Any] * len(value)
        if cls is tuple and (kind.whole is not tuple) and args[-1:] != (Ellipsis,):
            kinds = args
        if len(kinds) != len(value):
            raise self.error(where, f"{type(value).__name__} of {len(value)}, wanted {_name(kind.whole)}")
        pairs = enumerate(zip(value, kinds, strict=True))
        made = [self.make(item, item_kind, where.below(place)) for place, (item, item_kind) in pairs]
        if cls is collections.deque:
            return collections.deque(made, value.maxlen)
        if cls in SETS:
            found = SETS[cls](made)
            if len(found) != len(made):
                raise self.error(where, "two items become one")
            return found
        return tuple(made) if cls is tuple else made

    def mapping(self, value: Any, kind: _Kind, where: _Place) -> Any:
        cls, args = kind.cls, kind.args
        named = cls in {collections.OrderedDict, collections.defaultdict, collections.Counter}
        if not isinstance(value, cls if named else dict):
            raise self.misfit(value, kind.whole, where)
        if not args:
            return value
        held: Any = value
        of_key, of_value = (args[0], int) if cls is collections.Counter else args
        made: Any = {}
        if named:
            made = collections.defaultdict(held.default_factory) if cls is collections.defaultdict else cls()
        for key, item in value.items():
            name = self.make(key, of_key, where.below(f"key {key!r}"))
            if name in made:
                raise self.error(where, f"two keys become {_shown(name)}")
            made[name] = self.make(item, of_value, where.below(key))
        return made

    def members(self, value: Any, kind: type[Any], where: _Place) -> dict[str, Any]:
        """The names and values of what fills a dataclass."""
        members: Mapping[Any, Any]
        if isinstance(value, ConfigObject) and not value.args and not value.elements:
            members = value.attributes
        elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
            members = vars(value)
        elif isinstance(value, dict):
            members = value
        else:
            raise self.misfit(value, kind, where)
        if isinstance(value, ConfigDict):
            private = {name for name in value.attributes if str(name).startswith("__") and str(name).endswith("__")}
            for name in value.attributes.keys() - private:
                if name not in value or value[name] is not value.attributes[name]:
                    raise self.error(where.below(name), f"an attribute of {value.class_name} beside its items")
        for name in members:
            if not isinstance(name, str):
                raise self.error(where, f"the key {_shown(name)} is no name of a field")
        return dict(members)

    def check_names(self, found: Collection[str], known: Collection[str], kind: type[Any], where: _Place) -> None:
        unknown = [name for name in found if name not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, 1)
            what = f"{kind.__qualname__} has no field {', '.join(unknown)}"
            raise self.error(where.below(unknown[0]), what, f"did you mean {near[0]!r}?" if near else None)

    def check_missing(self, missing: Sequence[str], kind: type[Any], where: _Place) -> None:
        if missing:
            raise self.error(where.below(missing[0]), f"missing; {kind.__qualname__} needs {', '.join(missing)}")

    def annotations(self, kind: type[Any]) -> dict[str, Any]:
        if kind not in self.hints:
            try:
                self.hints[kind] = typing.get_type_hints(kind, include_extras=typing.is_typeddict(kind))
            except (NameError, TypeError) as error:
                raise UsageError(f"the annotations of {kind.__qualname__} cannot be resolved: {error}") from error
        return self.hints[kind]

    def structure(self, value: Any, whole: _Kind, where: _Place) -> Any:
        kind = whole.cls
        members, hints = self.members(value, kind, where), self.annotations(kind)
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        self.check_names(members, fields, kind, where)
        no = dataclasses.MISSING
        needed = [name for name, field in fields.items() if field.default is no and field.default_factory is no]
        self.check_missing([name for name in needed if name not in members], kind, where)
        made = {name: self.make(item, hints[name], where.below(name)) for name, item in members.items()}
        try:
            return kind(**made)
        except (TypeError, ValueError) as error:
            raise self.error(where, f"{kind.__qualname__} refuses it: {error}") from error

    def typed_dict(self, value: Any, whole: _Kind, where: _Place) -> Any:
        kind: Any = whole.cls
        members, hints = self.members(value, kind, where), self.annotations(kind)
        self.check_names(members, hints, kind, where)
        self.check_missing([name for name in hints if name not in members and _is_required(kind, name)], kind, where)
        plain = {name: _required(hint) for name, hint in hints.items()}
        return {name: self.make(item, plain[name], where.below(name)) for name, item in members.items()}

    def member(self, value: Any, whole: _Kind, where: _Place) -> Any:
        """The member that a pickled one names; another enum of the same name in another module is taken for it."""
        kind = whole.cls
        if isinstance(value, ConfigName) and value.kind == "global":
            owner, _, name = value.name.rpartition(".")
            if owner.rpartition(".")[2] == kind.__name__ and name in kind.__members__:
                return kind[name]
        is_one = isinstance(value, ConfigObject) and len(value.args) == 1 and not value.attributes
        if is_one and value.class_name.rpartition(".")[2] == kind.__name__:
            try:
                return kind(value.args[0])
            except ValueError as error:
                raise self.error(where, str(error)) from error
        raise self.misfit(value, kind, where)

    def of_torch(self, value: Any, kind: _Kind, where: _Place) -> Any:
        """Constants of torch, for callers who have imported it."""
        cls = kind.cls
        if cls.__name__ == "Size" and isinstance(value, tuple):
            return cls(value)
        if isinstance(value, ConfigName) and value.kind == cls.__name__:
            if cls.__name__ == "device":
                return cls(value.name)
            constant = getattr(sys.modules["torch"], value.name.removeprefix("torch."), None)
            if isinstance(constant, cls):
                return constant
        raise self.misfit(value, cls, where)

    def array(self, value: Any, kind: _Kind, where: _Place) -> Any:
        args = kind.args
        if not isinstance(value, np.ndarray):
            raise self.misfit(value, kind.whole, where)
        wanted = get_args(args[1])[0] if len(args) > 1 and get_args(args[1]) else np.generic
        if isinstance(wanted, type) and not issubclass(value.dtype.type, wanted):
            raise self.error(where, f"array of {value.dtype}, wanted {wanted.__name__}")
        return value


def _is_required(kind: Any, name: str) -> bool:
    """Whether a TypedDict needs a name; its own list misses what annotations that are texts say."""
    origin = get_origin(typing.get_type_hints(kind, include_extras=True)[name])
    return origin is typing.Required or (origin is not typing.NotRequired and name in kind.__required_keys__)


def _required(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) in {typing.Required, typing.NotRequired} else kind
