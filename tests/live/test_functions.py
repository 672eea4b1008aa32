"""Functions and methods as programs: what they refer to are slots under the names that it has there."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import reweft
import reweft.torch as rt

SCALE = torch.tensor([2.0, 3.0, 4.0, 5.0])


def seeded(seed: int) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    torch.manual_seed(seed)
    return nn.Linear(4, 4).eval(), torch.randn(4), {"a": torch.randn(4, 4), "b": [torch.randn(4)]}


def made(seed: int) -> Any:
    net, w, params = seeded(seed)

    def function(x: torch.Tensor, *, shift: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = net(x * w) * SCALE + x @ params["a"] + params["b"][0] + shift
        return out

    return function


def state(seed: int) -> dict[str, torch.Tensor]:
    net, w, params = seeded(seed)
    held = {f"net.{key}": value for key, value in net.state_dict().items()}
    return held | {"w": w, "params.a": params["a"], "params.b.0": params["b"][0], "SCALE": SCALE}


def test_what_a_function_refers_to_is_refitted_by_name() -> None:
    x, shift = torch.randn(2, 4), torch.randn(4)
    model = rt.trace(made(0), x, kwargs={"shift": shift})
    assert {names[0] for names in model.slots()} == set(state(0))
    for seed in (0, 1):
        rt.replace_weights(model, state(seed))
        with torch.no_grad():
            torch.testing.assert_close(model(x, shift=shift), made(seed)(x, shift=shift))
    partial = state(2)
    del partial["w"]
    with pytest.raises(reweft.MismatchError, match='"w"'):
        rt.replace_weights(model, partial)


def test_method_of_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x).relu()
            return out

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = -self.fc(x)
            return out

    net, x = Net().eval(), torch.randn(3, 4)
    model = rt.trace(net.encode, x)
    assert [names[0] for names in model.slots()] == ["fc.weight", "fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), net.encode(x))
        torch.testing.assert_close(net(x), -net.fc(x))


def test_partial_and_default_arguments() -> None:
    w = torch.randn(4)

    def function(x: torch.Tensor, by: torch.Tensor, base: torch.Tensor = w) -> torch.Tensor:
        return x * by + base

    by = torch.randn(4)
    model, x = rt.trace(functools.partial(function, by=by), torch.randn(4)), torch.randn(4)
    assert {names[0] for names in model.slots()} == {"by", "base"}
    torch.testing.assert_close(model(x), x * by + w)
    rt.replace_weights(model, {"by": torch.zeros(4), "base": torch.ones(4)})
    torch.testing.assert_close(model(x), torch.ones(4))


def test_module_in_training_mode_is_refused_in_a_function_too() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))

    def function(x: torch.Tensor) -> Any:
        return net(x) + 1

    with pytest.raises(reweft.UsageError, match="training"):
        rt.trace(function, torch.randn(4))


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(reweft.UsageError, match="neither a module nor a function"):
        rt.trace(3, torch.randn(4))  # type: ignore[arg-type]


def test_what_is_referred_to_by_no_name_is_said() -> None:
    """A function within the function has names of its own, which nobody sees from outside."""
    net = nn.Linear(4, 4).eval()
    held = [lambda x: net(x)]  # noqa: PLW0108  (a function of its own is the point)

    def function(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = held[0](x) + 1
        return out

    with pytest.warns(UserWarning, match="lifted_tensor_0"):
        model = rt.trace(function, torch.randn(2, 4))
    assert all(names[0].startswith("lifted_tensor_") for names in model.slots())
    with pytest.raises(reweft.MismatchError, match="by no name"):
        rt.trace(function, torch.randn(2, 4), strict=True)
