"""New weights for a compiled model: refit it, or compile it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import reweft
import reweft.torch as rt

from . import processes
from .rows import Row
from .subject import compile_stock, in_turn
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from .subject import Subject


def rows(subject: Subject) -> list[Row]:
    again, refitted = subject.folder / "again.pt2", subject.folder / "refitted.pt2"
    live = rt.load(subject.package)
    weights = in_turn(subject.checkpoints)

    def refit() -> None:
        processes.run(processes.command(), "refit", subject.package, subject.checkpoints[1], "-o", refitted)

    jobs = {
        "compile": Job(lambda: compile_stock(subject.net, subject.inputs, again)),
        "load": Job(lambda: torch._inductor.aoti_load_package(str(again))),
        "command": Job(refit, repeats=5),
        "call": Job(lambda: reweft.refit(subject.package, subject.checkpoints[1], out=refitted), repeats=5),
        "live": Job(lambda: rt.replace_weights(live, next(weights)), repeats=5),
    }
    found = median_seconds(jobs, rounds=3)
    compiled = "compile again"
    return [
        Row("refit on disk, command", found["command"], found["compile"], compiled),
        Row("refit on disk, in process", found["call"], found["compile"], compiled),
        Row("refit live, .pt", found["live"], found["compile"] + found["load"], "compile again and load"),
    ]
