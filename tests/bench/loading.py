"""From a package of 1 GB on disk to the first answer, in a process of its own; what a second process adds to memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import reweft.torch as rt

from . import processes
from .rows import Row

if TYPE_CHECKING:
    from .files import Files

ROWS, WIDTH = 1_950_000, 128
ROUNDS = 5

# From the path to the first answer; the imports are not counted.
LOAD = """
import sys, time, torch
import reweft.torch as rt, torch._inductor as inductor
x, start = torch.tensor([[1, 2, 3]]), time.perf_counter()
{load}(sys.argv[1])(x)
print(time.perf_counter() - start)
"""
# Loads, answers once, and stays until its input ends.
HOLD = """
import sys, torch
import reweft.torch as rt
model = rt.load(sys.argv[1])
model(torch.tensor([[1, 2, 3]]))
print(flush=True)
sys.stdin.read()
"""


class Table(torch.nn.Module):
    """Next to no work on many weights."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(rows, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.table(x))
        return out


def rows(files: Files) -> list[Row]:
    large, small = (_package(files.folder / f"table{count}.pt2", count) for count in (ROWS, 8))
    try:
        seconds: dict[str, list[float]] = {"rt.load": [], "inductor.aoti_load_package": []}
        for _ in range(ROUNDS):
            for load, found in seconds.items():
                found.append(float(processes.script(LOAD.format(load=load), large)))
        ours, peer = (sorted(found)[ROUNDS // 2] for found in seconds.values())
        held = [more - less for more, less in zip(_memory(large), _memory(small), strict=True)]
    finally:
        large.unlink()
    nbytes = 4 * ROWS * WIDTH
    return [
        Row(f"load {nbytes / 1e9:.1f} GB and answer once", ours, peer, "aoti_load_package"),
        Row("memory of its weights in two processes", held[1], held[0], "in one; bar: 1.05 times", "MB"),
    ]


def _package(path: Path, count: int) -> Path:
    rt.save(rt.trace(Table(count).eval(), torch.tensor([[1, 2, 3]])), path)
    return path


def _memory(package: Path) -> list[float]:
    """Megabytes of physical memory of one process with a package, and of two."""
    held: list[subprocess.Popen[str]] = []
    sums = []
    try:
        for _ in range(2):
            line = [sys.executable, "-c", HOLD, str(package)]
            held.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            assert held[-1].stdout is not None
            assert held[-1].stdout.readline() == "\n"
            sums.append(sum(_megabytes_of(process.pid) for process in held))
    finally:
        for process in held:
            process.communicate()
    return sums


def _megabytes_of(pid: int) -> float:
    """Physical memory of a process, each page divided by the processes that have it (PSS)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in rollup if line.startswith("Pss:"))) / 1e6
