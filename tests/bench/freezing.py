"""A frozen ResNet-18 that takes new weights: how fast it runs, and what new weights and recipes cost."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import reweft
import reweft.torch as rt

from . import processes
from .rows import Row
from .timing import Job, median_seconds

# The models lie with the tests.
sys.path.append(str(Path(__file__).parents[1]))
from frozen_models import ResNet, seeded_frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .subject import Subject

_STOCK: dict[str, Any] = {"freezing": True}
# What one processor computes is what is compared; a refit uses both.
_INPUT = torch.rand(1, 3, 224, 224)


def rows(subject: Subject) -> list[Row]:
    folder = subject.folder / "frozen"
    folder.mkdir(exist_ok=True)
    old, new = seeded_frozen(ResNet, 0), seeded_frozen(ResNet, 1)
    torch.save(old.state_dict(), folder / "old.pt")
    torch.save(new.state_dict(), folder / "new.pt")
    models: dict[str, rt.CompiledModule] = {}
    compile_jobs = {
        "frozen": Job(lambda: models.update(frozen=rt.trace(old, _INPUT, freeze=True))),
        "plain": Job(lambda: stock(old, folder / "plain.pt2")),
    }
    compiled = median_seconds(compile_jobs, rounds=1)
    models["kept"] = rt.trace(old, _INPUT)
    plain = torch._inductor.aoti_load_package(str(folder / "plain.pt2"))
    package, written = folder / "frozen.pt2", folder / "written.pt2"
    rt.save(models["frozen"], package)
    weights = alternating(folder / "new.pt", folder / "old.pt")
    rt.replace_weights(models["frozen"], folder / "new.pt")
    calls = {
        "frozen": Job(lambda: models["frozen"](_INPUT), repeats=20),
        "plain": Job(lambda: plain(_INPUT), repeats=20),
        "kept": Job(lambda: models["kept"](_INPUT), repeats=20),
    }
    called = median_seconds(calls, rounds=5)
    standby = rt.load(package, standby=True)
    refits = {
        "command": Job(
            lambda: processes.run(processes.command(), "refit", package, folder / "new.pt", "-o", written), repeats=3
        ),
        "engine": Job(lambda: reweft.refit(package, folder / "new.pt", out=written), repeats=3),
        "floor": Job(floor(package, folder / "new.pt", folder / "copied.pt2"), repeats=3),
        "live": Job(lambda: rt.replace_weights(standby, next(weights)), repeats=5),
    }
    refitted = median_seconds(refits, rounds=5)
    return [
        Row("a call of a refitted frozen ResNet-18", called["frozen"], called["plain"], "plain freezing=True"),
        Row("the same", called["frozen"], called["kept"], "trace without freeze"),
        Row("its refit on disk, command", refitted["command"], refitted["floor"], "its files, and 3 copies in memory"),
        Row("the same, in process", refitted["engine"], refitted["floor"], "the same"),
        Row("its refit live, .pt", refitted["live"], compiled["plain"], "freeze again"),
        Row("trace(freeze=True)", compiled["frozen"], compiled["plain"], "plain freezing=True"),
    ]


def stock(module: torch.nn.Module, package: Path) -> None:
    """Compile with plain freezing, which takes no new weights."""
    with torch.no_grad():
        program = torch.export.export(module, (_INPUT,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=_STOCK)


def floor(package: Path, weights: Path, out: Path) -> Callable[[], None]:
    """What a refit cannot do without, with three copies of the weights: read them, write a package that is safe on the
    disk, and put it in the place of another one."""
    room, more = bytearray(weights.stat().st_size), bytearray(weights.stat().st_size)

    def job() -> None:
        with weights.open("rb") as file:
            file.readinto(room)
        for _ in range(3):
            memoryview(more)[:] = room
        fresh = out.with_suffix(".new")
        shutil.copyfile(package, fresh)
        with fresh.open("rb") as file:
            os.fsync(file)
        fresh.replace(out)

    return job


def alternating(*paths: Path) -> Iterator[Path]:
    """One after the other, without end."""
    while True:
        yield from paths
