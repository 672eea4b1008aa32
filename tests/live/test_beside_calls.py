"""Replacements beside calls: nobody waits who need not, nothing of the old weights stays, no state is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import assert_same, differs, save_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Package


class Slow(nn.Module):
    """A call of it takes long enough to do something meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(512, 512) / 22)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(60):
            x = torch.tanh(x @ self.weight)
        return x


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slow") / "slow.pt2"
    rows = ({0: torch.export.Dim("rows", min=2, max=4096)},)
    rt.save(rt.trace(models.seeded(Slow, 0), torch.randn(1024, 512), dynamic_shapes=rows), path)
    return path


def run_all(*jobs: Callable[[], object], timeout: float = 120) -> None:
    """Run jobs in threads of their own; what one of them raises is raised here."""
    failed: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  (raised below)
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


def mapped(path: Path) -> bool:
    """Whether this process has the file mapped."""
    return str(path) in Path("/proc/self/maps").read_text()


def test_a_call_that_starts_after_a_refit_does_not_wait_for_one_that_started_before(slow: Path) -> None:
    """A call of two rows is over long before one of 4096 that began on the old weights."""
    model, many, few = rt.load(slow, replicas=2), torch.randn(4096, 512), torch.randn(2, 512)
    before = model(few)
    events: list[str] = []

    def old() -> None:
        model(many)
        events.append("old call ends")

    def refit() -> None:
        rt.replace_weights(model, models.seeded(Slow, 1).state_dict())
        events.append("refit ends")

    def new() -> None:
        while not differs(model(few), before):
            pass
        events.append("new call ends")

    thread = threading.Thread(target=old)
    thread.start()
    # The call has begun when it holds one of two replicas; a refit that came first would have nothing to wait for.
    time.sleep(0.05)
    run_all(refit, new)
    thread.join()
    assert events[0] == "new call ends"
    assert sorted(events[1:]) == ["old call ends", "refit ends"]


def test_old_file_is_unmapped_when_the_refit_returns(digits: Package, tmp_path: Path) -> None:
    model = digits.load()
    paths = [save_state(digits.module(seed), tmp_path / f"{seed}.pt") for seed in (1, 2)]
    rt.replace_weights(model, paths[0])
    assert mapped(paths[0])
    rt.replace_weights(model, paths[1])
    assert not mapped(paths[0])
    assert mapped(paths[1])
    rt.replace_weights(model, digits.module(3))
    assert not mapped(paths[1])


def test_old_file_stays_mapped_while_somebody_reads_its_weights(digits: Package, digits_b: Path) -> None:
    model = digits.load()
    rt.replace_weights(model, digits_b)
    state = model._core.state()
    rt.replace_weights(model, digits.module(0))
    assert mapped(digits_b)
    read = reweft.Checkpoint(state)["fc.bias"].read()
    assert bytes(read) == digits.module(1).get_parameter("fc.bias").detach().numpy().tobytes()
    del state, read
    assert not mapped(digits_b)


def test_failed_refit_keeps_nothing_of_the_new_file(digits: Package, tmp_path: Path) -> None:
    model = digits.load()
    wanted = model(*digits.inputs)
    state = digits.module(1).state_dict()
    state["fc.bias"] = torch.zeros(5)
    path = tmp_path / "bad.pt"
    torch.save(state, path)
    for _ in range(3):
        with pytest.raises(reweft.MismatchError):
            rt.replace_weights(model, path)
        assert not mapped(path)
    assert_same(model(*digits.inputs), wanted)
    rt.replace_weights(model, digits.module(1))
    assert differs(model(*digits.inputs), wanted)


def test_no_increment_is_lost_beside_refits(counter: Package) -> None:
    """Both sets of weights share the buffers that are kept; no two calls may write to them at once."""
    model, done = counter.load(), threading.Event()
    states = [{"weight": models.seeded(models.Counter, seed).weight} for seed in (0, 1)]
    calls = 400
    counts: list[list[int]] = [[], []]

    def call(number: int) -> None:
        for _ in range(calls):
            counts[number].append(int(model(*counter.inputs)[1]))

    def refit() -> None:
        number = 0
        while not done.is_set():
            rt.replace_weights(model, states[number % 2], allow_missing=True)
            number += 1
        assert number > 10

    def callers() -> None:
        try:
            run_all(*(lambda number=number: call(number) for number in (0, 1)))
        finally:
            done.set()

    run_all(callers, refit)
    assert sorted(counts[0] + counts[1]) == list(range(1, 2 * calls + 1))
    state = model.state_dict()
    assert int(state["calls"]) == 2 * calls
    assert torch.equal(state["total"], torch.full((4,), 2.0 * calls))


def test_state_read_beside_calls_is_not_half_written(counter: Package) -> None:
    model, done = counter.load(), threading.Event()

    def call() -> None:
        try:
            for _ in range(500):
                model(*counter.inputs)
        finally:
            done.set()

    def look() -> None:
        while not done.is_set():
            state = model.state_dict()
            assert torch.equal(state["total"], torch.full((4,), float(state["calls"])))

    run_all(call, look)


def test_two_refits_four_callers_and_readers_never_wait_for_ever(half_width: Package) -> None:
    model = half_width.load(replicas=2)
    states: list[Any] = [half_width.module(seed).state_dict() for seed in (0, 1)]
    wanted = []
    for state in states:
        rt.replace_weights(model, state)
        wanted.append(model(*half_width.inputs))
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            output = model(*half_width.inputs)
            assert any(torch.equal(output, one) for one in wanted)

    def refit(first: int) -> None:
        try:
            for number in range(3000):
                rt.replace_weights(model, states[(first + number) % 2])
        finally:
            done.set()

    def look() -> None:
        while not done.is_set():
            model.state_dict()

    run_all(call, call, call, call, look, lambda: refit(0), lambda: refit(1))
