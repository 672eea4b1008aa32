"""New weights for a model in memory: `replace_weights`, or torch's `load_constants`.

`load_constants` writes over the weights in use, compares neither shape nor dtype nor CRC, and may run beside a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import safetensors.torch
import torch

import reweft.torch as rt

from .rows import Row
from .subject import in_turn
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from .subject import StateDict, Subject


def rows(subject: Subject) -> list[Row]:
    model = rt.load(subject.package)
    peer = torch._inductor.aoti_load_package(str(subject.package))
    borrower = torch._inductor.aoti_load_package(str(subject.package))
    ours, theirs, lent = (in_turn(subject.states) for _ in range(3))
    ours_pt, theirs_pt = (in_turn(subject.checkpoints) for _ in range(2))
    ours_st, theirs_st = (in_turn(subject.safetensors) for _ in range(2))

    def constants(state: StateDict) -> None:
        peer.load_constants(state, check_full_update=True)

    jobs = {
        "state_dict": Job(lambda: rt.replace_weights(model, next(ours))),
        "copied": Job(lambda: constants(next(theirs))),
        "lent": Job(lambda: borrower.load_constants(next(lent), check_full_update=True, user_managed=True)),
        ".pt": Job(lambda: rt.replace_weights(model, next(ours_pt))),
        "torch.load": Job(lambda: constants(torch.load(next(theirs_pt), mmap=True))),
        "safetensors": Job(lambda: rt.replace_weights(model, next(ours_st))),
        "load_file": Job(lambda: constants(safetensors.torch.load_file(next(theirs_st)))),
    }
    median_seconds(jobs, rounds=2)  # the first touch of new memory is not what is asked
    found = median_seconds(jobs, rounds=15)
    return [
        Row("replace, state_dict", found["state_dict"], found["copied"], "load_constants, which copies too"),
        Row("replace, state_dict", found["state_dict"], found["lent"], "the same with user_managed=True: no copy"),
        Row("replace, .pt, CRC compared", found[".pt"], found["torch.load"], "torch.load(mmap=True) + load_constants"),
        Row("replace, safetensors", found["safetensors"], found["load_file"], "load_file + load_constants"),
    ]
