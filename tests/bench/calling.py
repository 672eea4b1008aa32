"""One model, several threads that call it.

Callers read the same weights. Where these come from a cache that the cores share, two callers can reach more than
twice the calls of one.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING

import torch

import reweft.torch as rt

from .rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from .subject import Subject

SECONDS = 1.0
ROUNDS = 5


def calls_per_second(model: Callable[[torch.Tensor], object], inputs: torch.Tensor, threads: int) -> float:
    """Calls of all threads together; every thread computes with one core."""
    rates = [0.0] * threads
    barrier = threading.Barrier(threads)

    def caller(number: int) -> None:
        torch.set_num_threads(1)
        model(inputs)
        barrier.wait()
        calls, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            model(inputs)
            calls += 1
        rates[number] = calls / elapsed

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(threads)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return sum(rates)


def rows(subject: Subject) -> list[Row]:
    ours = rt.load(subject.package, replicas=2)
    peer = torch._inductor.aoti_load_package(str(subject.package), num_runners=2)
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for threads in (1, 2):
            for name, model in (("ours", ours), ("peer", peer)):
                rate = calls_per_second(model, subject.inputs, threads)
                rates.setdefault((name, threads), []).append(rate)
    median = {key: statistics.median(found) for key, found in rates.items()}
    ours_gain, peer_gain = (median[name, 2] / median[name, 1] for name in ("ours", "peer"))
    loader = "aoti_load_package(num_runners=2)"
    return [
        Row("calls, one thread", median["ours", 1], median["peer", 1], loader, "calls/s"),
        Row("calls, two threads", median["ours", 2], median["peer", 2], loader, "calls/s"),
        Row("two threads over one", ours_gain, peer_gain, loader, "x"),
    ]
