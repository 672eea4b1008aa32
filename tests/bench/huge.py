"""New weights for an archive that needs 64-bit sizes and offsets, and that torch and `zipfile` read it afterwards.

One storage of 4.6 GB with a tensor at either end, so that slots lie before and behind the boundary of 4 GiB, and a
record behind it. Takes twice that much of the disk for a while.
"""

from __future__ import annotations

import os
import time
import zipfile
from typing import TYPE_CHECKING

import torch

from . import processes
from .processes import command, run
from .rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .files import Files

STORAGE_NBYTES = 4_600_000_000
BOUNDARY = 1 << 32


def rows(files: Files) -> list[Row]:
    artifact, checkpoint, out = (files.folder / f"huge.{name}.pt" for name in ("artifact", "checkpoint", "out"))
    try:
        _prepare(artifact, checkpoint)
        copied = _seconds(lambda: run("cp", "--reflink=never", artifact, out), lambda: processes.sync(out))
        out.unlink()
        refitted = _seconds(lambda: run(command(), "refit", artifact, checkpoint, "-o", out))
        _check(artifact, torch.zeros(3, 1000))
        in_place = _seconds(lambda: run(command(), "refit", artifact, checkpoint, "--in-place"))
        run("cmp", artifact, out)
        out.unlink()
        _check(artifact, *torch.load(checkpoint).values())
        with zipfile.ZipFile(artifact) as archive:
            assert archive.testzip() is None
    finally:
        for path in (artifact, checkpoint, out):
            path.unlink(missing_ok=True)
    what = f"refit {STORAGE_NBYTES / 1e9:.1f} GB"
    return [
        Row(f"{what}, a copy", refitted, copied, "floor: cp, then fsync"),
        Row(f"{what}, 12 KB in place", in_place, refitted, "the same as a copy"),
    ]


def _prepare(artifact: Path, checkpoint: Path) -> None:
    base = torch.zeros(STORAGE_NBYTES // 4)
    torch.save({"first": base[:1000], "last": base[-1000:], "behind": torch.zeros(1000)}, artifact)
    # The archive is what this topic is about.
    with zipfile.ZipFile(artifact) as archive:
        infos = archive.infolist()
    assert any(info.file_size > BOUNDARY for info in infos)
    assert any(info.header_offset > BOUNDARY and info.filename.endswith("data/1") for info in infos)
    torch.save({name: torch.randn(1000) for name in ("first", "last", "behind")}, checkpoint)


def _check(artifact: Path, *wanted: torch.Tensor) -> None:
    """torch's own loader gives these tensors."""
    found = torch.load(artifact, mmap=True)
    rows = wanted[0] if len(wanted) == 1 else wanted
    assert all(torch.equal(one, other) for one, other in zip(found.values(), rows, strict=True))
    assert found["first"].untyped_storage().data_ptr() == found["last"].untyped_storage().data_ptr()


def _seconds(*jobs: Callable[[], object]) -> float:
    """What jobs take together, once: they move gigabytes."""
    os.sync()
    start = time.perf_counter()
    for job in jobs:
        job()
    return time.perf_counter() - start
