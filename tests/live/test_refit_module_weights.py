"""`refit_module_weights`: Torch-TensorRT's call, where a model that differs is never let out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import assert_same, assert_says, differs

if TYPE_CHECKING:
    from support import Package


def test_a_new_model_has_the_new_weights_and_the_old_one_its_own(digits: Package) -> None:
    model, module = digits.load(), digits.module(1)
    before = model(*digits.inputs)
    refitted = rt.refit_module_weights(model, module, digits.inputs, verify_output=True)
    assert refitted is not model
    with torch.no_grad():
        assert torch.allclose(refitted(*digits.inputs), module(*digits.inputs), atol=2e-5)
    assert_same(model(*digits.inputs), before)
    rt.replace_weights(refitted, digits.module(2))
    rt.replace_weights(model, digits.module(1))
    assert differs(model(*digits.inputs), refitted(*digits.inputs))


@pytest.mark.parametrize("name", ["digits", "tied", "mixed", "half_width", "views", "counter", "recurrent"])
@pytest.mark.parametrize("in_place", [False, True])
def test_modules_programs_and_state_dicts(name: str, *, in_place: bool, request: pytest.FixtureRequest) -> None:
    package: Package = request.getfixturevalue(name)
    module, wanted = package.module(1), package.load()
    rt.replace_weights(wanted, module)
    outputs = wanted(*package.inputs)
    program = torch.export.export(module, package.inputs)
    for weights in (module, program):
        model = package.load()
        refitted = rt.refit_module_weights(model, weights, package.inputs, verify_output=True, in_place=in_place)
        assert (refitted is model) == in_place
        assert_same(refitted(*package.inputs), outputs)
    state_only = rt.refit_module_weights(package.load(), module.state_dict(), in_place=in_place)
    assert state_only.state_dict().keys() == wanted.state_dict().keys()


class Two(nn.Module):
    """The second output alone depends on a number that is part of the program."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"first": x * self.weight, "second": x * self.weight * self.scale}


class OtherScale(Two):
    scale = 3.0


@pytest.mark.parametrize("in_place", [False, True])
def test_a_second_output_that_differs_is_found_and_the_old_weights_stay(*, in_place: bool) -> None:
    x = torch.randn(4)
    model = rt.trace(models.seeded(Two, 0), x)
    before, version = model(x), model.weights_version
    other = models.seeded(OtherScale, 1)
    with pytest.raises(reweft.MismatchError) as error:
        rt.refit_module_weights(model, other, (x,), verify_output=True, in_place=in_place)
    assert_says(error, "output['second']", "4 of 4 elements differ")
    assert_same(model(x), before)
    assert model.weights_version == version
    # Nobody asked to compare.
    refitted = rt.refit_module_weights(model, other, (x,), in_place=in_place)
    assert_same(refitted(x)["first"], x * other.weight.detach())


def test_neither_reference_nor_inputs_nor_state_change(counter: Package) -> None:
    model, module = counter.load(), counter.module(1)
    inputs = [value.clone() for value in counter.inputs]
    refitted = rt.refit_module_weights(model, module, inputs, verify_output=True)
    assert int(module.get_buffer("calls")) == 0
    assert int(refitted(*counter.inputs)[1]) == 1
    assert int(model(*counter.inputs)[1]) == 1
    assert_same(inputs, list(counter.inputs))


def test_weights_that_do_not_fit_change_nothing(digits: Package, tied: Package) -> None:
    model = digits.load()
    before = model(*digits.inputs)
    for weights in (tied.module(0), {"fc.bias": torch.ones(4)}, nn.Linear(2, 2).eval()):
        with pytest.raises(reweft.MismatchError):
            rt.refit_module_weights(model, weights, in_place=True)
    assert_same(model(*digits.inputs), before)


def test_what_cannot_be_verified_is_refused(digits: Package) -> None:
    model = digits.load()
    with pytest.raises(reweft.UsageError, match="inputs"):
        rt.refit_module_weights(model, digits.module(1), verify_output=True)
    with pytest.raises(reweft.UsageError, match="compares with"):
        rt.refit_module_weights(model, digits.module(1).state_dict(), digits.inputs, verify_output=True)
    with pytest.raises(reweft.UsageError, match="eval"):
        rt.refit_module_weights(model, digits.module(1).train(), digits.inputs, verify_output=True)


def test_single_tensor_as_input_and_tolerances(digits: Package) -> None:
    model, module = digits.load(), digits.module(1)
    (x,) = digits.inputs
    rt.refit_module_weights(model, module, x, verify_output=True)
    with pytest.raises(reweft.MismatchError, match="rtol 0, atol 1e-12"):
        rt.refit_module_weights(model, module, x, verify_output=True, rtol=0, atol=1e-12)


class Hidden(nn.Module):
    """A tensor in a list is a slot by its path; an exported program only numbers it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.many = [torch.randn(4)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.many[0]


def test_program_that_lacks_a_tensor_by_name_is_refused() -> None:
    x = torch.randn(4)
    model = rt.trace(models.seeded(Hidden, 0), x)
    assert ("many.0",) in model.slots()
    other = models.seeded(Hidden, 1)
    with pytest.raises(reweft.MismatchError, match=r"many\.0"):
        rt.refit_module_weights(model, torch.export.export(other, (x,)))
    refitted = rt.refit_module_weights(model, other, x, verify_output=True)
    with torch.no_grad():
        assert torch.allclose(refitted(x), other(x))
