"""From `.pt` to safetensors and from safetensors to other keys: whole processes, from start to exit."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from . import processes
from .files import SMALL_TENSORS
from .processes import CONVERT, command, run, script, sync
from .rows import Row
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from .files import Files

ROUNDS = 5
SCRIPT = "a Python script: torch.load(mmap=True) + save_file"
READER = "pytorch-reader + safetensors, tensor by tensor"


def rows(files: Files) -> list[Row]:
    out = files.out
    try:
        return [*_many(files, out), *_large(files, out), *_rekey(files, out), *_memory(files, out)]
    finally:
        out.unlink(missing_ok=True)


def copy(path: Path, out: Path, *, durable: bool = False) -> None:
    """A copy whose blocks are written again, as those of a conversion are."""
    run("cp", "--reflink=never", path, out)
    if durable:
        sync(out)


def _medians(jobs: dict[str, Job], out: Path) -> dict[str, float]:
    """Every job finds no old file to replace and no pages of another job that still wait for the disk."""

    def tidy() -> None:
        out.unlink(missing_ok=True)
        os.sync()

    return median_seconds(jobs, rounds=ROUNDS, before=tidy)


def _jobs(path: Path, out: Path) -> dict[str, Job]:
    jobs = {
        "ours": Job(lambda: run(command(), "convert", path, out)),
        "ours, no sync": Job(lambda: run(command(), "convert", "--no-sync", path, out)),
        "script": Job(lambda: script(CONVERT, path, out)),
        "cp": Job(lambda: copy(path, out)),
        "cp + fsync": Job(lambda: copy(path, out, durable=True)),
    }
    if peers := processes.peers():
        jobs["reader"] = Job(lambda: run(peers, "convert", path, out))
    return jobs


def _rows(what: str, found: dict[str, float]) -> list[Row]:
    plain, durable = found["ours, no sync"], found["ours"]
    reader = [Row(f"{what}, --no-sync", plain, found["reader"], READER)] if "reader" in found else []
    return [
        Row(what, durable, found["script"], f"{SCRIPT}, no fsync"),
        *reader,
        Row(f"{what}, --no-sync", plain, found["cp"], "floor: cp"),
        Row(what, durable, found["cp + fsync"], "floor: cp, then fsync"),
    ]


def _many(files: Files, out: Path) -> list[Row]:
    return _rows(f"convert {SMALL_TENSORS:,} tensors", _medians(_jobs(files.small, out), out))


def _large(files: Files, out: Path) -> list[Row]:
    return _rows("convert 1.05 GB", _medians(_jobs(files.large, out), out))


def _rekey(files: Files, out: Path) -> list[Row]:
    path, rule = files.large_safetensors, r"^model\.=net."
    jobs = {
        "ours": Job(lambda: run(command(), "convert", "--no-sync", "--remap", rule, path, out)),
        "cp": Job(lambda: copy(path, out)),
    }
    found = _medians(jobs, out)
    return [Row("re-key 1.05 GB of safetensors, --no-sync", found["ours"], found["cp"], "floor: cp --reflink=never")]


def _memory(files: Files, out: Path) -> list[Row]:
    ours = processes.anonymous_megabytes([command(), "convert", "--no-sync", files.large, out])
    theirs = processes.anonymous_megabytes([sys.executable, "-c", CONVERT, files.large, out])
    return [Row("convert 1.05 GB: anonymous memory", ours, theirs, SCRIPT, "MB")]
