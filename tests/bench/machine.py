"""The facts about the machine without which the numbers mean nothing."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

import reweft


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    found = (0, "unknown file system")
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind, *_ = line.split()
        if folder.is_relative_to(mount):
            found = max(found, (len(mount), kind))
    return found[1]


class Others:
    """How much of the machine other programs took since this was made: their work is in every number."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Time by the clock, and seconds of all cores that were not this program's or its children's."""
        ticks = Path("/proc/stat").read_text(encoding="utf-8").split()[1:4]
        own = os.times()[:4]
        return time.perf_counter(), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") - sum(own)

    def cores(self) -> float:
        (before, used), (now, used_now) = self._start, self._now()
        return max(0.0, used_now - used) / (now - before)


def facts(folder: Path) -> str:
    cores = len(os.sched_getaffinity(0))
    build = "" if _optimised() else ", extension built WITHOUT optimisation"
    return (
        f"{cores} cores, {processor()}, {torch.backends.cpu.get_cpu_capability()}; "
        f"Linux {platform.release()}, {file_system(folder.resolve())}; "
        f"Python {platform.python_version()}, torch {torch.__version__}{build}"
    )


def _optimised() -> bool:
    """Optimised extensions are a few megabytes, others tens."""
    return Path(reweft._core.__file__).stat().st_size < 30e6
