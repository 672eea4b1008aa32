"""Key maps: which keys of a checkpoint, under which names, and what is made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reweft import _core
from reweft.errors import UsageError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

__all__ = ["KeyMap", "KeyReport"]


@dataclass(frozen=True)
class KeyReport:
    """What a key map did to a list of keys."""

    recipes: dict[str, str]
    """By name, in order: the key it was, or how it is made of keys (`qkv | part 0 of 3 along 0`)."""
    renamed: dict[str, str]
    """Name by key, for tensors that only have another name now."""
    made: tuple[str, ...]
    """Names of tensors that operations make."""
    dropped: tuple[str, ...]
    """Keys that were not selected, and names that a rule dropped."""
    matches: dict[str, int]
    """How many names each rule matched; rules of the same text are counted together."""
    idle: tuple[str, ...]
    """Rules that matched nothing; often a typing error."""

    def compare(self, wanted: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names that are wanted and not there, and names that are there and not wanted."""
        names = dict.fromkeys(wanted)
        return tuple(n for n in names if n not in self.recipes), tuple(n for n in self.recipes if n not in names)

    @classmethod
    def _parse(cls, text: str) -> KeyReport:
        data = json.loads(text)
        plain = {name: steps[0]["key"] for name, steps in data["tensors"].items() if len(steps) == 1}
        matches: dict[str, int] = {}
        for rule, count in data["rules"]:
            matches[rule] = matches.get(rule, 0) + count
        return cls(
            recipes=data["recipes"],
            renamed={key: name for name, key in plain.items() if key != name},
            made=tuple(name for name in data["tensors"] if name not in plain),
            dropped=tuple(data["dropped"]),
            matches=matches,
            idle=tuple(data["idle_rules"]),
        )


class KeyMap:
    r"""A selection of keys, and ordered rules that rename them and make tensors of them.

    Patterns are Rust `regex`, which takes time linear in the key: no look-around, no back-references in patterns.
    Operations cost nothing until a tensor is read: a permuted, cut or reshaped tensor is a view of the same bytes.

    Args:
        rules: Applied in order, each to the names that the one before left. A pair is a pattern and its replacement
            (`$1`, `${1}`, `${name}`; every match in a name is replaced). A mapping is a rule as in a key map file:
            `{"strip_prefix": "module."}`, `{"drop": "..."}`, `{"renumber": True, "except": [...]}`,
            `{"match": r"\.weight$", "permute": [1, 0]}` (or `transpose`, `reshape`, `cast`),
            `{"match": r"(.*)\.qkv$", "split": ["$1.q", "$1.k", "$1.v"], "dim": 0}`,
            `{"concat": [r"(.*)\.q$", r"(.*)\.k$"], "into": "$1.qk", "dim": 0}`.
        select: Patterns of which a key must match at least one, before any rule. None keeps every key.
        select_keys: Whole keys to keep.
        drop: Patterns of keys to leave out, before any rule.
        drop_keys: Whole keys to leave out.

    Raises:
        UsageError: A pattern does not compile, a replacement names a group that its pattern lacks, or a rule has fields
            that do not belong together.

    Example:
        >>> KeyMap([(r"^module\.", "")]).apply(["module.fc.weight"])
        {'module.fc.weight': 'fc.weight'}
    """

    def __init__(
        self,
        rules: Iterable[tuple[str, str] | Mapping[str, Any]] = (),
        *,
        select: Iterable[str] = (),
        select_keys: Iterable[str] = (),
        drop: Iterable[str] = (),
        drop_keys: Iterable[str] = (),
    ) -> None:
        listed = {"select": select, "select_keys": select_keys, "drop": drop, "drop_keys": drop_keys}
        self._text: dict[str, Any] = {
            name: [given] if isinstance(given, str) else [str(item) for item in given] for name, given in listed.items()
        }
        self._text["rules"] = [_rule(rule) for rule in rules]
        self._core = _core.KeyMap(json.dumps(self._text))

    @classmethod
    def from_toml(cls, text: str) -> KeyMap:
        r"""Read a key map from TOML text.

        Raises:
            UsageError: It is no TOML, has a field that key maps lack, or as for the class.

        Example:
            >>> KeyMap.from_toml("[[rules]]\nstrip_prefix = 'module.'").apply(["module.w"])
            {'module.w': 'w'}
        """
        return cls._wrap(_core.KeyMap.from_toml(text), "from TOML")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> KeyMap:
        """Read a key map from a TOML file.

        Raises:
            IoError: The file cannot be read.
            UsageError: As `from_toml`.
        """
        return cls._wrap(_core.KeyMap.open(path), f"from {path}")

    @classmethod
    def _wrap(cls, core: _core.KeyMap, origin: str) -> KeyMap:
        keys = cls.__new__(cls)
        keys._text = {"origin": origin}  # noqa: SLF001  (its own)
        keys._core = core  # noqa: SLF001  (its own)
        return keys

    @property
    def top_level_key(self) -> str | None:
        """The container that holds the weights, if the file names one; `reweft.open` uses it."""
        return self._core.top_level_key

    def apply(self, keys: Iterable[str]) -> dict[str, str]:
        """Map keys to names; keys that are not selected are left out.

        Raises:
            KeyCollisionError: Two keys get one name.
            NotFoundError: A selection matches no key.
            UsageError: The rules leave nothing of a key, or they make tensors of others: `report` tells of those.
        """
        report = self.report(keys)
        if report.made:
            raise UsageError(
                f"the rules make {report.made[0]!r} by an operation, which is no renaming",
                key=report.made[0],
                hint="report() tells what is made of what",
            )
        return {key: name for name, key in report.recipes.items()}

    def report(self, keys: Iterable[str]) -> KeyReport:
        """Say what becomes of keys: names, recipes, what is dropped, which rules match.

        Raises:
            KeyCollisionError: Two keys get one name, or a join finds two tensors for one part.
            NotFoundError: A selection matches no key, or a join lacks a part.
            UsageError: The rules leave nothing of a key.
        """
        return KeyReport._parse(self._core.apply(list(keys)))  # noqa: SLF001  (one module)

    def __repr__(self) -> str:
        if "origin" in self._text:
            return f"<KeyMap {self._text['origin']}>"
        rules = [
            (rule["rename"], rule["to"]) if set(rule) == {"rename", "to"} else rule for rule in self._text["rules"]
        ]
        named = (f", {name}={given!r}" for name, given in self._text.items() if given and name != "rules")
        return f"KeyMap({rules!r}{''.join(named)})"


def _rule(rule: tuple[str, str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(rule, tuple | list):
        pattern, replacement = rule
        return {"rename": str(pattern), "to": str(replacement)}
    return dict(rule)
