"""What `compile` saves: the second model of an architecture, and a call after a step of the optimizer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

import reweft.torch as rt

from . import encoder
from .rows import Row
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from .subject import Subject


def rows(subject: Subject) -> list[Row]:
    tokens = torch.randint(0, encoder.WORDS, (encoder.BATCH, encoder.LENGTH))
    cache = rt.ProgramCache(subject.folder / "programs")
    # torch's first export imports half of it, which is no part of either.
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))

    def first_call(seed: int) -> tuple[float, rt.LiveModule]:
        module = encoder.make(seed)
        start = time.perf_counter()
        compiled = rt.compile(module, cache_dir=cache)
        compiled(tokens)
        return time.perf_counter() - start, compiled

    first, compiled = first_call(0)
    again = sorted(first_call(seed)[0] for seed in range(1, 6))
    (package,) = cache.list()
    plain = rt.load(package)
    # Programs of the cache have numbers for names, in the order of the parameters.
    weights = {f"w{number}": value.detach() for number, value in enumerate(compiled.parameters())}
    rt.replace_weights(plain, weights, copy=False)
    step = _step(compiled)
    jobs = {
        "stepped": Job(lambda: compiled(tokens)),
        "plain": Job(lambda: plain(tokens)),
        "eager": Job(lambda: compiled._live.module(tokens)),
    }
    with torch.no_grad():
        found = median_seconds(jobs, rounds=60, before=step)
    megabytes = sum(value.nbytes for value in weights.values()) / 1e6
    return [
        Row(f"second model of an architecture, {megabytes:.0f} MB", again[2], first, "the first: export and compile"),
        Row("call after a step of the optimizer", found["stepped"], found["plain"], "a call of the same program"),
        Row("call after a step of the optimizer", found["stepped"], found["eager"], "the module itself"),
        *_tiny(cache),
    ]


def _step(module: torch.nn.Module) -> Callable[[], object]:
    """A step of the optimizer, in place."""
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-6)
    for value in parameters:
        value.grad = torch.ones_like(value)
    return optimizer.step


def _tiny(cache: rt.ProgramCache) -> list[Row]:
    """What following costs by itself, where a call is short."""
    module, x = torch.nn.Linear(4, 4).eval().requires_grad_(requires_grad=False), torch.randn(2, 4)
    compiled = rt.compile(module, cache_dir=cache)
    compiled(x)
    plain = rt.load(cache.list()[-1])
    rt.replace_weights(plain, {"w0": module.weight, "w1": module.bias}, copy=False)
    found = median_seconds({"live": Job(lambda: compiled(x), 2000), "plain": Job(lambda: plain(x), 2000)}, rounds=15)
    return [Row("call of a tiny model that is followed", found["live"], found["plain"], "a call of the same program")]
