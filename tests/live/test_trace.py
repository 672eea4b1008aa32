"""`trace`: every weight stays a slot under its own name, or is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import assert_hints, assert_same

if TYPE_CHECKING:
    from support import Package


NEVER_READ = {"bn1.num_batches_tracked", "bn2.num_batches_tracked", "nothing"}


@pytest.mark.parametrize("name", ["digits", "mixed", "views", "half_width", "counter", "recurrent", "weightless"])
def test_every_weight_that_is_read_is_a_slot(name: str, request: pytest.FixtureRequest) -> None:
    package: Package = request.getfixturevalue(name)
    model, module = package.load(), package.module(0)
    wanted = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    if name == "mixed":
        wanted.add("offset")
    assert {slot[0] for slot in model.slots()} == {key for key in wanted if key not in NEVER_READ}
    assert all(len(slot) == 1 for slot in model.slots())
    assert model.refittable().unrefittable == {}


def test_tied_weights_are_one_slot_of_two_names(tied: Package) -> None:
    model = tied.load()
    assert model.slots() == [("embedding.weight", "head.weight")]
    state = model.state_dict()
    assert set(state) == {"embedding.weight", "head.weight"}
    assert torch.equal(state["embedding.weight"], tied.module(0).state_dict()["head.weight"])


def test_unused_weights_may_be_given_and_left_out(digits: Package) -> None:
    model, state = digits.load(), digits.module(1).state_dict()
    rt.replace_weights(model, state)
    wanted = model(*digits.inputs)
    for key in ("bn1.num_batches_tracked", "bn2.num_batches_tracked"):
        del state[key]
    rt.replace_weights(model, state)
    assert_same(model(*digits.inputs), wanted)


def test_traced_model_has_weights_of_its_own() -> None:
    module = models.seeded(models.HalfWidth, 3)
    inputs = (torch.randn(3, 8, dtype=torch.bfloat16),)
    model = rt.trace(module, inputs[0])
    before = model(*inputs)
    with torch.no_grad():
        assert_same(before, module(*inputs))
        for value in module.parameters():
            value.zero_()
    assert_same(model(*inputs), before)


def test_training_mode_is_refused() -> None:
    with pytest.raises(reweft.UsageError, match="eval") as error:
        rt.trace(nn.BatchNorm2d(3), torch.zeros(1, 3, 2, 2))
    assert_hints(error)


class Listed(nn.Module):
    """Tensors that are in a list have no path that a key could name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.many = [torch.randn(4), torch.randn(4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.many[0] * self.many[1]


def test_tensors_in_a_list_are_replaced_or_refused() -> None:
    """They must not stay as they were without an error when a whole module is given."""
    x, other = torch.randn(4), models.seeded(Listed, 1)
    model = rt.trace(models.seeded(Listed, 0), x)
    try:
        rt.replace_weights(model, other)
    except reweft.ReweftError:
        return
    with torch.no_grad():
        assert torch.allclose(model(x), other(x))


def test_zero_replicas_are_refused(digits: Package) -> None:
    with pytest.raises(reweft.UsageError):
        digits.load(replicas=0)


class Overlapping(nn.Module):
    """A buffer that is a view of one that the program writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.zeros(4))
        self.register_buffer("part", self.get_buffer("whole")[:2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("whole").add_(1)
        return x + self.get_buffer("part").sum()


def test_written_buffer_that_another_is_a_view_of_is_refused() -> None:
    with pytest.raises(reweft.UnsupportedError, match="functional"):
        rt.trace(Overlapping().eval(), torch.ones(3))


def test_forward_that_writes_to_attributes_is_refused() -> None:
    # Export compiles the value of the first call in, and puts the attribute back.
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.steps, self.seen = 0, [1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            out: torch.Tensor = self.fc(x) + self.steps
            return out

    class Gathering(Stepping):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(2)
            out: torch.Tensor = self.fc(x) + sum(self.seen)
            return out

    for kind, name in ((Stepping, "steps is 1, was 0"), (Gathering, "seen")):
        with pytest.raises(reweft.UnsupportedError, match=f"a call changes what the module is.*{name}") as error:
            rt.trace(kind().eval(), torch.zeros(1, 2))
        assert_hints(error)
