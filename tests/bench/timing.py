"""How things are timed: medians of interleaved runs, so that a busy moment of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Job:
    """Something to time."""

    run: Callable[[], object]
    repeats: int = 1
    """Runs in each round; more for what is quick."""


def median_seconds(
    jobs: Mapping[str, Job], *, rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Seconds of each job: the median over all runs. The rounds go through the jobs in turn; `before` is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            for _ in range(job.repeats):
                before()
                start = time.perf_counter()
                job.run()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(runs) for name, runs in seconds.items()}
