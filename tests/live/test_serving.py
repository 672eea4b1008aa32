"""Calls: inputs are checked, and weights change between calls, never within one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import reweft
import reweft.torch as rt
from support import assert_same, beside, differs, save_state

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package

REFITS = 1000


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("source", ["memory", "memory, standby", "file"])
def test_every_output_beside_a_thousand_refits_is_of_old_or_new_weights(
    source: str, replicas: int, digits: Package, tmp_path: Path
) -> None:
    model = rt.load(digits.path, replicas=replicas, standby="standby" in source)
    weights: list[Any] = [save_state(digits.module(seed), tmp_path / f"{seed}.pt") for seed in (0, 1)]
    if source != "file":
        weights = [digits.module(seed).state_dict() for seed in (0, 1)]
    wanted = []
    for one in weights:
        rt.replace_weights(model, one)
        wanted.append(model(*digits.inputs))
    assert differs(*wanted)
    seen, torn, failed, done = [0, 0], 0, [], threading.Event()

    def serve() -> None:
        nonlocal torn
        try:
            while not done.is_set() or not all(seen):
                output = model(*digits.inputs)
                matches = [torch.equal(output, one) for one in wanted]
                torn += not any(matches)
                for number, match in enumerate(matches):
                    seen[number] += match
        except BaseException as error:  # noqa: BLE001  (told to the main thread)
            failed.append(error)

    server = threading.Thread(target=serve)
    server.start()
    try:
        for number in range(REFITS):
            rt.replace_weights(model, weights[number % 2])
        for number in range(200):
            if all(seen):
                break
            rt.replace_weights(model, weights[number % 2])
            done.wait(0.005)
    finally:
        done.set()
        seen_in_time = list(seen)
        seen[:] = [max(count, 1) for count in seen]
        server.join(60)
    assert not server.is_alive()
    assert failed == []
    assert torn == 0
    assert all(seen_in_time)


def test_callers_share_the_weights_of_two_replicas(digits: Package) -> None:
    model = digits.load(replicas=2)
    wanted = model(*digits.inputs)
    outputs: list[torch.Tensor] = []

    def call() -> None:
        outputs.extend(model(*digits.inputs) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outputs) == 200
    assert all(torch.equal(output, wanted) for output in outputs)


def test_two_threads_that_refit_leave_one_set_of_weights(digits: Package) -> None:
    model, wanted = digits.load(), []
    states = [digits.module(seed).state_dict() for seed in (0, 1)]
    for state in states:
        rt.replace_weights(model, state)
        wanted.append(model(*digits.inputs))

    def refit(state: dict[str, torch.Tensor]) -> None:
        for _ in range(100):
            rt.replace_weights(model, state)

    threads = [threading.Thread(target=refit, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    output = model(*digits.inputs)
    assert any(torch.equal(output, one) for one in wanted)


@pytest.mark.parametrize("standby", [False, True])
def test_state_read_beside_refits_is_of_one_set_of_weights(digits: Package, standby: bool) -> None:  # noqa: FBT001
    """With `standby` a refit fills the memory of the weights before the last; a reader of those must keep them."""
    model = rt.load(digits.path, standby=standby)
    states = [digits.module(seed).state_dict() for seed in (0, 1)]
    read: list[dict[str, torch.Tensor]] = []
    with beside(lambda: read.append(model.state_dict())):
        for number in range(400):
            rt.replace_weights(model, states[number % 2])
    assert read
    for state in read:
        assert any(all(torch.equal(value, one[key]) for key, value in state.items()) for one in states)


def test_outputs_outlive_the_model_and_its_weights(digits: Package) -> None:
    model = digits.load()
    output = model(*digits.inputs)
    kept = output.clone()
    rt.replace_weights(model, digits.module(1))
    del model
    assert torch.equal(output, kept)


class TestInputs:
    @pytest.fixture
    def model(self, digits: Package) -> rt.CompiledModule:
        return digits.load()

    @pytest.mark.parametrize(
        "value",
        [
            torch.zeros(3, 1, 8, 8),
            torch.zeros(2, 1, 8),
            torch.zeros(2, 8, 8, 1),
            torch.zeros(2, 1, 8, 8, dtype=torch.float64),
            torch.zeros(2, 1, 8, 8, dtype=torch.int32),
            torch.zeros(2, 1, 8, 8, device="meta"),
        ],
        ids=lambda value: f"{value.dtype} {list(value.shape)} {value.device}",
    )
    def test_other_shape_dtype_or_device(self, value: torch.Tensor, model: rt.CompiledModule) -> None:
        with pytest.raises(reweft.MismatchError) as error:
            model(value)
        assert str(list(value.shape)) in str(error.value)
        assert "float32 [2, 1, 8, 8]" in str(error.value)

    def test_other_structure(self, model: rt.CompiledModule, digits: Package) -> None:
        (x,) = digits.inputs
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((), {}), ((x, x), {}), (([x],), {}), ((), {"x": x}), ((x,), {"y": x}), (({"x": x},), {}),
        ]  # fmt: skip
        for args, kwargs in calls:
            with pytest.raises(reweft.UsageError):
                model(*args, **kwargs)

    @pytest.mark.parametrize("value", [None, 1.5, "x"])
    def test_no_tensor(self, value: Any, model: rt.CompiledModule) -> None:
        with pytest.raises(reweft.UsageError):
            model(value)

    def test_sparse_input(self, model: rt.CompiledModule) -> None:
        with pytest.raises(reweft.ReweftError):
            model(torch.zeros(2, 1, 8, 8).to_sparse())

    def test_other_strides_give_the_same_outputs(self, model: rt.CompiledModule, digits: Package) -> None:
        (x,) = digits.inputs
        wanted = model(x)
        padded = torch.zeros(2, 3, 10, 12)
        padded[:, 1:2, 1:9, 2:10] = x
        others = [
            x.transpose(2, 3).contiguous().transpose(2, 3),
            x.to(memory_format=torch.channels_last),
            padded[:, 1:2, 1:9, 2:10],
            torch.cat([torch.zeros(1), x.reshape(-1)])[1:].view(x.shape),
            torch.nn.Parameter(x),
            x.clone().requires_grad_(),
        ]
        for other in others:
            before = other.detach().clone()
            assert_same(model(other), wanted)
            assert torch.equal(other, before)
        same = x[:1].expand(2, 1, 8, 8)
        assert_same(model(same), model(same.contiguous()))

    def test_outputs_carry_no_gradient(self, model: rt.CompiledModule, digits: Package) -> None:
        assert not model(digits.inputs[0].clone().requires_grad_()).requires_grad

    def test_two_inputs_are_not_mixed_up(self, weightless: Package) -> None:
        x, y = weightless.inputs
        model = weightless.load()
        assert_same(model(x, y), weightless.kind()(x, y))
        assert_same(model(y, x), weightless.kind()(y, x))
        assert_same(model(x, x), weightless.kind()(x, x))

    def test_model_still_runs_after_refused_calls(self, model: rt.CompiledModule, digits: Package) -> None:
        wanted = model(*digits.inputs)
        for _ in range(3):
            with pytest.raises(reweft.MismatchError):
                model(torch.zeros(1))
        assert_same(model(*digits.inputs), wanted)


class Writes(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * self.weight


def test_program_that_writes_to_its_input_writes_to_the_callers_tensor_or_is_refused() -> None:
    x = torch.randn(2, 4)
    try:
        model = rt.trace(Writes().eval(), x.clone())
    except reweft.ReweftError:
        return
    for given in (x.clone(), torch.empty(4, 2).t().copy_(x)):
        try:
            model(given)
        except reweft.ReweftError:
            assert torch.equal(given, x)
        else:
            assert torch.equal(given, x + 1)


def test_printing_a_model_says_what_it_takes(digits: Package) -> None:
    assert "float32 [2, 1, 8, 8]" in repr(digits.load())
