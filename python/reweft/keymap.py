"""Key maps: which keys of a checkpoint, under which names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reweft import _core

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["KeyMap"]


class KeyMap:
    r"""A selection of keys and ordered rules that rename them.

    Patterns are Rust `regex`, which takes time linear in the key: no look-around, no back-references in patterns.

    Args:
        rules: Pairs of pattern and replacement (`$1`, `${1}`, `${name}`). They apply in order, each to the result
            of the one before; every match in a key is replaced.
        select: Patterns of which a key must match at least one, before any rule. None keeps every key.

    Raises:
        UsageError: A pattern does not compile, or a replacement names a group that its pattern lacks.

    Example:
        >>> KeyMap([(r"^module\.", "")]).apply(["module.fc.weight"])
        {'module.fc.weight': 'fc.weight'}
    """

    def __init__(self, rules: Iterable[tuple[str, str]] = (), *, select: Iterable[str] = ()) -> None:
        self.rules = tuple((str(pattern), str(replacement)) for pattern, replacement in rules)
        self.select = (select,) if isinstance(select, str) else tuple(select)
        self._core = _core.KeyMap(list(self.rules), list(self.select))

    def apply(self, keys: Iterable[str]) -> dict[str, str]:
        """Map keys to names; keys that are not selected are left out.

        Raises:
            KeyCollisionError: Two keys get one name.
            NotFoundError: A selection matches no key.
            UsageError: The rules leave nothing of a key.
        """
        names, _dropped, _idle = self._core.apply(list(keys))
        return dict(names)

    def __repr__(self) -> str:
        return f"KeyMap({list(self.rules)!r}, select={list(self.select)!r})"
