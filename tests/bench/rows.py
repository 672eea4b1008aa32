"""Rows of results and the table they are printed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One thing, done here and by a peer in the same run."""

    what: str
    ours: float
    peer: float
    peer_is: str
    unit: Literal["seconds", "calls/s", "x", "MB"] = "seconds"

    @property
    def ratio(self) -> float:
        """How many times better we do: times shorter or smaller, or as many times more calls."""
        return self.peer / self.ours if self.unit in {"seconds", "MB"} else self.ours / self.peer

    def cells(self) -> tuple[str, str, str, str, str]:
        return (
            self.what,
            _text(self.ours, self.unit),
            _text(self.peer, self.unit),
            f"{self.ratio:.2g}x" if self.ratio < 10 else f"{self.ratio:,.0f}x",
            self.peer_is,
        )


HEADER = ("", "reweft", "peer", "ratio", "the peer is")


def _text(value: float, unit: str) -> str:
    if unit == "x":
        return f"{value:.2f}x"
    if unit == "MB":
        return f"{value:,.0f} MB"
    if unit == "calls/s":
        return f"{value:,.0f} /s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e6:.0f} us"


def table(rows: list[Row]) -> str:
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    aligned = []
    for first, *numbers, last in lines:
        middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        aligned.append("  ".join([first.ljust(widths[0]), *middle, last]).rstrip())
    return "\n".join(aligned)
