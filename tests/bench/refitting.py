"""New weights for 1.05 GB on disk, in a copy and in place: whole processes, from start to exit.

The artifact is a `.pt` file; what is written is the same for a compiled package of the same slots.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

import reweft

from . import processes
from .files import LARGE_SHAPE, LARGE_TENSORS
from .processes import command, run
from .rows import Row
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from .files import Files

ROUNDS = 5
SMALL_SLOTS = 200
SMALL_NUMEL = 16384


def rows(files: Files) -> list[Row]:
    artifact, others = files.folder / "artifact.pt", [files.folder / f"other{number}.pt" for number in (0, 1)]
    small = [files.folder / f"few{number}.pt" for number in (0, 1)]
    _prepare(files, artifact, others[1], small)
    out = files.folder / "out.pt"
    try:
        return [*_copy(artifact, others[1], out), *_in_place(artifact, small, out), *_reading(artifact, others[1])]
    finally:
        for path in (artifact, others[1], *small, out):
            path.unlink(missing_ok=True)


def _prepare(files: Files, artifact: Path, other: Path, small: list[Path]) -> None:
    """An artifact of large and small slots, other values for all of them, and two sets for the small ones."""
    state = torch.load(files.large, mmap=True)
    sets = [{f"few.{i}": torch.full((SMALL_NUMEL,), float(i + n)) for i in range(SMALL_SLOTS)} for n in range(3)]
    torch.save({**state, **sets[0]}, artifact)
    large = {f"model.layers.{i}.weight": torch.randn(LARGE_SHAPE) for i in range(LARGE_TENSORS)}
    torch.save({**large, **sets[1]}, other)
    for path, values in zip(small, sets[1:], strict=True):
        torch.save(values, path)


def _copy(artifact: Path, other: Path, out: Path) -> list[Row]:
    def tidy() -> None:
        out.unlink(missing_ok=True)
        os.sync()

    def durable_copy() -> None:
        run("cp", "--reflink=never", artifact, out)
        processes.sync(out)

    refit = [command(), "refit", artifact, other, "-o", out]
    jobs = {"ours": Job(lambda: run(*refit)), "cp": Job(durable_copy)}
    found = median_seconds(jobs, rounds=ROUNDS, before=tidy)
    out.unlink()
    held = processes.anonymous_megabytes(refit)
    return [
        Row("refit 1.07 GB, a copy", found["ours"], found["cp"], "floor: cp, then fsync"),
        Row("refit 1.07 GB: anonymous memory", held, 64, "bar: 64 MB", "MB"),
    ]


def _in_place(artifact: Path, small: list[Path], out: Path) -> list[Row]:
    """200 slots of 64 KiB, back and forth."""
    turns = [iter(small * ROUNDS), iter(small * ROUNDS)]
    pieces = [bytes(4 * SMALL_NUMEL)] * SMALL_SLOTS
    scratch = out.with_name("scratch")
    processes.run("cp", artifact, scratch)
    step = 5_000_000

    def raw() -> None:
        with scratch.open("r+b") as file:
            for number, piece in enumerate(pieces):
                os.pwrite(file.fileno(), piece, number * step)
            os.fdatasync(file.fileno())

    def in_place() -> None:
        reweft.refit(artifact, next(turns[0]), in_place=True, allow_missing=True)

    def copy() -> None:
        reweft.refit(artifact, next(turns[1]), out=out, allow_missing=True)

    jobs = {"ours": Job(in_place), "raw": Job(raw), "copy": Job(copy)}
    found = median_seconds(jobs, rounds=ROUNDS, before=os.sync)
    scratch.unlink()
    return [
        Row("refit 200 slots of 64 KiB in place", found["ours"], found["raw"], "floor: pwrite + fdatasync"),
        Row("refit 200 slots of 64 KiB in place", found["ours"], found["copy"], "the same as a copy of 1.07 GB"),
    ]


def _reading(artifact: Path, other: Path) -> list[Row]:
    plan = [command(), "plan", artifact, other, "--json"]
    jobs = {
        "plan": Job(lambda: run(*plan)),
        "verify": Job(lambda: reweft.verify(artifact, artifact)),
        "read": Job(lambda: run("cmp", artifact, artifact.with_name("twin.pt"))),
    }
    run("cp", artifact, artifact.with_name("twin.pt"))
    found = median_seconds(jobs, rounds=ROUNDS)
    artifact.with_name("twin.pt").unlink()
    return [
        Row("plan for 1.07 GB", found["plan"], 0.05, "bar: 50 ms"),
        Row("verify 1.07 GB", found["verify"], found["read"], "cmp of two such files"),
    ]
