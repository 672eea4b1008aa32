"""New weights for files that need 64-bit sizes and offsets, and that torch and `zipfile` read them afterwards.

An archive of one storage of 4.6 GB with a tensor at either end, so that slots lie before and behind the boundary of
4 GiB, and a record behind it; and a compiled package of 2.3 GB. Takes twice as much of the disk for a while.
"""

from __future__ import annotations

import os
import time
import zipfile
from typing import TYPE_CHECKING

import torch

import reweft.torch as rt

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
    return [*_archive(files), _compiled(files)]


class Model(torch.nn.Module):
    """Small weights before and behind a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.table = torch.nn.Embedding(9_000_000, 64)
        self.last = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(self.table(x)))
        return out


def _compiled(files: Files) -> Row:
    """A compiled package above 2 GiB: torch's own loader computes with the new weights at both of its ends."""
    package, checkpoint, out = (files.folder / name for name in ("model.pt2", "small.pt", "model.out.pt2"))
    model, x = Model().eval().requires_grad_(requires_grad=False), torch.tensor([0, 5, 8_999_999])
    try:
        rt.save(rt.trace(model, x), package)
        assert package.stat().st_size > 1 << 31
        for name, value in model.named_parameters():
            if not name.startswith("table"):
                value.normal_()
        torch.save({name: value for name, value in model.state_dict().items() if "table" not in name}, checkpoint)
        copied = _seconds(lambda: run("cp", "--reflink=never", package, out), lambda: processes.sync(out))
        out.unlink()
        refitted = _seconds(lambda: run(command(), "refit", package, checkpoint, "--allow-missing", "-o", out))
        torch.testing.assert_close(torch._inductor.aoti_load_package(str(out))(x), model(x))
    finally:
        for path in (package, checkpoint, out):
            path.unlink(missing_ok=True)
    return Row("refit a compiled package of 2.3 GB, a copy", refitted, copied, "floor: cp, then fsync")


def _archive(files: Files) -> list[Row]:
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
