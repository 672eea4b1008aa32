"""What a call costs beside the work itself: a program of next to no work, from Python and through its C interface."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import reweft.torch as rt

from . import processes
from .rows import Row
from .subject import compile_stock
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from .subject import Subject

WIDTH = 4
BATCH = 2
CALLS = 2000
ROUNDS = 15


def rows(subject: Subject) -> list[Row]:
    net, x = torch.nn.Linear(WIDTH, WIDTH).eval(), torch.randn(BATCH, WIDTH)
    package, stock = subject.folder / "tiny.pt2", subject.folder / "tiny_stock.pt2"
    rt.save(rt.trace(net, x), package)
    compile_stock(net, x, stock)
    bare = _c_loop(subject.folder, stock)
    ours, peer = rt.load(package), torch._inductor.aoti_load_package(str(package))

    def often(model: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(CALLS):
                model(x)

        return call

    floor: list[float] = []
    jobs = {"ours": Job(often(ours)), "peer": Job(often(peer)), "bare": Job(lambda: floor.append(bare()))}
    found = {name: seconds / CALLS for name, seconds in median_seconds(jobs, rounds=ROUNDS).items()}
    least = sorted(floor)[len(floor) // 2]
    return [
        Row("one call, tiny program", found["ours"], found["peer"], "aoti_load_package"),
        Row(
            "one call over the C interface",
            found["ours"] - least,
            10e-6,
            f"bar: 10 us; the interface {least * 1e6:.1f} us",
        ),
    ]


def _c_loop(folder: Path, package: Path) -> Callable[[], float]:
    """A program that calls the package's library in a loop, and gives the seconds of a call."""
    library, program = folder / "tiny.so", folder / "c_abi"
    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".wrapper.so"))
        library.write_bytes(archive.read(name))
    libraries = Path(torch.__file__).parent / "lib"
    source = Path(__file__).with_name("c_abi.cpp")
    processes.run(os.environ.get("CXX", "g++"), "-O2", "-std=c++17", source, "-o", program, "-ldl")
    line = [program, libraries / "libtorch_cpu.so", library, BATCH, WIDTH, CALLS]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}

    def seconds() -> float:
        done = subprocess.run([str(part) for part in line], check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout) / 1e9

    return seconds
