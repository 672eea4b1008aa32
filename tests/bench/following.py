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
    plain, nbytes = _plain(compiled, cache)
    step = _step(compiled)
    jobs = {
        "stepped": Job(lambda: compiled(tokens)),
        "plain": Job(lambda: plain(tokens)),
        "eager": Job(lambda: compiled._live.module(tokens)),
    }
    with torch.no_grad():
        found = median_seconds(jobs, rounds=60, before=step)
    return [
        Row(
            f"second model of an architecture, {nbytes / 1e6:.0f} MB", again[2], first, "the first: export and compile"
        ),
        Row("call after a step of the optimizer", found["stepped"], found["plain"], "a call of the same program"),
        Row("call after a step of the optimizer", found["stepped"], found["eager"], "the module itself"),
        Row("of that, looking at 85 tensors and 52 parts", _looking(compiled), 20e-6, "bar: 20 us"),
        *_tiny(cache),
    ]


def _plain(compiled: rt.LiveModule, cache: rt.ProgramCache) -> tuple[rt.CompiledModule, int]:
    """The program that a module runs, by itself, on the same storages; and the bytes of its weights."""
    plain = rt.load(cache.list()[-1])
    places, held = compiled._live._programs[0]._places, dict(compiled.named_parameters())
    weights = {name: held[path].detach() for name, path in places.items()}
    rt.replace_weights(plain, weights, copy=False)
    return plain, sum(value.nbytes for value in weights.values())


def _looking(compiled: rt.LiveModule) -> float:
    """What a call does before it runs."""
    watch = compiled._live._watch
    assert watch is not None
    return median_seconds({"look": Job(lambda: watch.moved() or watch.changed(), 200)}, rounds=5)["look"]


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
    plain, _nbytes = _plain(compiled, cache)
    found = median_seconds({"live": Job(lambda: compiled(x), 2000), "plain": Job(lambda: plain(x), 2000)}, rounds=15)
    return [Row("call of a tiny model that is followed", found["live"], found["plain"], "a call of the same program")]
