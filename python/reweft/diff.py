"""Comparing checkpoints and compiled packages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reweft import _core
from reweft.checkpoint import Checkpoint

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

__all__ = [
    "AbsentTensor",
    "ChangedTensor",
    "ChangedValue",
    "DiffReport",
    "TiedTensors",
    "UnreadableTensor",
    "diff",
]

_Side = Literal["a", "b"]


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor that both sides have and that differs."""

    key: str
    """The name."""
    dtypes: tuple[str, str]
    """Dtype on either side."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Shape on either side."""
    differing: int | None
    """Elements that differ in any bit, or in value where the dtypes differ; None if they cannot be compared."""
    nan: int
    """Elements that are NaN on one side only."""
    nan_bits: int
    """Elements that are NaN on both sides, with other bits."""
    max_abs: float | None
    """The largest absolute difference, an exact int for integers; None if there are no numbers to subtract."""
    max_rel: float | None
    """The largest difference relative to the larger of the two numbers: from 0 to 2, or infinite."""
    at: tuple[int, ...] | None
    """Index of the largest absolute difference."""


@dataclass(frozen=True)
class AbsentTensor:
    """A tensor that one side lacks."""

    key: str
    """The name."""
    dtype: str | None
    """Its dtype; None if it cannot be read."""
    shape: tuple[int, ...] | None
    """Its shape; None if it cannot be read."""
    excuse: str | None
    """Why that is no difference, if so: a buffer that no state_dict has, a tensor that the program never reads."""


@dataclass(frozen=True)
class UnreadableTensor:
    """A tensor that both sides have and that could not be compared."""

    key: str
    """The name."""
    side: _Side
    """The side that cannot be read."""
    reason: str
    """Why."""


@dataclass(frozen=True)
class TiedTensors:
    """Names that are one tensor on one side, and not on the other."""

    keys: tuple[str, ...]
    """The names."""
    tied_in: _Side
    """The side on which they are one."""


@dataclass(frozen=True)
class ChangedValue:
    """Something that is no tensor and differs."""

    path: str
    """Dotted path."""
    a: str | None
    """What the first side has, cut short; None if nothing."""
    b: str | None
    """What the second side has, cut short; None if nothing."""


@dataclass(frozen=True, repr=False)
class DiffReport:
    """What differs between two sides. True if nothing does."""

    a: Path
    """The first side."""
    b: Path
    """The second side."""
    equal: bool
    """Whether nothing differs; ties, values that were not compared and names with an excuse do not count."""
    tensors: int
    """Tensors that both sides have and that can be read."""
    nbytes: int
    """Bytes of those that were compared by their elements."""
    changed: tuple[ChangedTensor, ...]
    """Tensors that differ, what changed most first: shapes, then NaN, then the largest absolute difference."""
    only_in_a: tuple[AbsentTensor, ...]
    """Tensors that only the first side has."""
    only_in_b: tuple[AbsentTensor, ...]
    """Tensors that only the second side has."""
    unreadable: tuple[UnreadableTensor, ...]
    """Tensors that both sides have and that could not be compared."""
    ties: tuple[TiedTensors, ...]
    """Names that are one tensor on one side only."""
    values: tuple[ChangedValue, ...]
    """What is no tensor and differs."""
    values_not_compared: tuple[str, ...]
    """Paths of values that have no form that could be compared."""

    def __bool__(self) -> bool:
        return self.equal

    def __repr__(self) -> str:
        parts = [f"{len(self.changed)} of {self.tensors} tensors differ"]
        if self.changed:
            first = self.changed[0]
            parts[0] += f", most {first.key!r}" + ("" if first.max_abs is None else f" by {first.max_abs:.4g}")
        for count, what in [
            (len(self.only_in_a), "only in a"),
            (len(self.only_in_b), "only in b"),
            (len(self.unreadable), "unreadable"),
            (len(self.values), "other values differ"),
        ]:
            if count:
                parts.append(f"{count} {what}")
        verdict = "equal" if self.equal else "different"
        return f"<DiffReport {str(self.a)!r} {str(self.b)!r}: {verdict}; {'; '.join(parts)}>"


def diff(
    a: Checkpoint | str | os.PathLike[str],
    b: Checkpoint | str | os.PathLike[str],
    *,
    only: str | Iterable[str] = (),
    values: bool = True,
) -> DiffReport:
    """Compare two checkpoints, or a checkpoint and a compiled package. Reads all tensors that both have.

    Tensors are matched by name and compared by their elements, so that layouts do not matter. Equal bytes are equal,
    NaN included. Integers are subtracted exactly, floats as float64, complex numbers by the modulus of the difference.
    To rename keys first, give checkpoints: `reweft.open(path, keys=...)`.

    Args:
        a: A file, or an open checkpoint.
        b: What to compare it with.
        only: Patterns of which a name must match at least one; none compares all.
        values: Also compare what is no tensor, where both files can hold such values.

    Raises:
        FormatError: A file is damaged.
        UnsupportedError: A file is of a kind that is not read.
        LimitError: A tensor repeats a small storage too often to walk it.
        UsageError: A pattern does not compile.
        IoError: A file cannot be read.

    Example:
        >>> report = reweft.diff("epoch3.pt", "epoch4.pt")  # doctest: +SKIP
        >>> [(change.key, change.max_abs) for change in report.changed[:3]]  # doctest: +SKIP
        [('fc.bias', 0.25), ('fc.weight', 0.125)]
    """
    sides = [side._core if isinstance(side, Checkpoint) else side for side in (a, b)]  # noqa: SLF001  (one package)
    patterns = [only] if isinstance(only, str) else list(only)
    data = json.loads(_core.diff(*sides, only=patterns, values=values))
    return DiffReport(
        a=Path(data["a"]["path"]),
        b=Path(data["b"]["path"]),
        equal=data["equal"],
        tensors=data["tensors"],
        nbytes=data["nbytes"],
        changed=tuple(map(_changed, data["changed"])),
        only_in_a=tuple(map(_absent, data["only_in_a"])),
        only_in_b=tuple(map(_absent, data["only_in_b"])),
        unreadable=tuple(UnreadableTensor(**row) for row in data["unreadable"]),
        ties=tuple(TiedTensors(tuple(row["keys"]), row["tied_in"]) for row in data["ties"]),
        values=tuple(ChangedValue(**row) for row in data["values"]),
        values_not_compared=tuple(data["values_not_compared"]),
    )


def _number(value: float | str | None) -> float | None:
    """Infinity travels as text, because JSON lacks it."""
    return float(value) if isinstance(value, str) else value


def _changed(row: dict[str, Any]) -> ChangedTensor:
    a, b = row["a"], row["b"]
    return ChangedTensor(
        key=row["key"],
        dtypes=(a["dtype"], b["dtype"]),
        shapes=(tuple(a["shape"]), tuple(b["shape"])),
        differing=row["differing"],
        nan=row["nan"],
        nan_bits=row["nan_bits"],
        max_abs=_number(row["max_abs"]),
        max_rel=_number(row["max_rel"]),
        at=None if row["at"] is None else tuple(row["at"]),
    )


def _absent(row: dict[str, Any]) -> AbsentTensor:
    layout = row["layout"]
    shape = None if layout is None else tuple(layout["shape"])
    return AbsentTensor(row["key"], None if layout is None else layout["dtype"], shape, row["excuse"])
