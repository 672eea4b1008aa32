"""What a config holds that Python's library and numpy have no class for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ConfigName:
    """A dtype, device or other constant of torch, or a class or function, by its name. `str()` gives the name."""

    kind: str
    """`dtype`, `device`, `layout`, `memory_format`, `qscheme`, or `global` for a class or function."""
    name: str
    """What torch prints: `torch.float32`, `cuda:0`; or the dotted name of a class or function."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ConfigObject:
    """An instance of a class that reweft does not import, or the result of a function that it does not call."""

    class_name: str
    """Dotted name of the class or function."""
    args: tuple[Any, ...] = ()
    """What it was to be called with; the value of an enum's member, the items of a namedtuple."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What its `__dict__` or slots held."""
    elements: list[Any] = field(default_factory=list)
    """What it held as a list."""


class ConfigDict(dict[Any, Any]):
    """An instance of a subclass of dict that reweft does not import: its items, and what else is known of it."""

    class_name: str
    """Dotted name of the class."""
    args: tuple[Any, ...]
    """What it was to be called with."""
    attributes: dict[str, Any]
    """What its `__dict__` or slots held."""

    def __init__(
        self, class_name: str, args: tuple[Any, ...], attributes: dict[str, Any], items: Mapping[Any, Any]
    ) -> None:
        super().__init__(items)
        self.class_name = class_name
        self.args = args
        self.attributes = attributes

    def __repr__(self) -> str:
        return f"<{self.class_name} {dict(self)!r}>"
