"""What a traced program takes and gives: structure, values that are no tensors, keywords."""

# ruff: noqa: FBT003  (flags are what these programs take)

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import reweft
import reweft.torch as rt
from support import assert_hints, assert_same, assert_says


class Nested(nn.Module):
    """Arguments and results of every kind that `torch.export` takes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, pair: dict[str, torch.Tensor], flag: Any, n: Any, *, mode: Any = "a", extra: Any = None) -> Any:
        x = pair["x"] * n
        if flag:
            x = self.fc(x)
        if mode == "a":
            x = x + 1
        return {"y": x, "n": n, "mode": mode, "extra": extra, "row": (pair["z"], 2.5, True, "text", pair["x"].shape[0])}


@pytest.fixture(scope="module")
def nested() -> tuple[rt.CompiledModule, nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module, pair = Nested().eval(), {"x": torch.randn(2, 4), "z": torch.randn(3)}
    return rt.trace(module, (pair, True, 3), kwargs={"mode": "a", "extra": None}), module, pair


def test_structure_of_the_result_is_the_modules(nested: Any) -> None:
    model, module, pair = nested
    with torch.no_grad():
        wanted = module(pair, True, 3)
    found = model(pair, True, 3, mode="a", extra=None)
    assert type(found["n"]) is int
    assert found["row"][1:] == (2.5, True, "text", 2)
    assert (found["n"], found["mode"], found["extra"]) == (3, "a", None)
    torch.testing.assert_close(found["y"], wanted["y"])
    assert_same(found["row"][0], wanted["row"][0])


def test_order_of_keywords_and_of_dicts_does_not_matter(nested: Any) -> None:
    model, _, pair = nested
    turned = {"z": pair["z"], "x": pair["x"]}
    found = model(turned, True, 3, extra=None, mode="a")
    assert_same(found["y"], model(pair, True, 3, mode="a", extra=None)["y"])


@pytest.mark.parametrize(
    ("flag", "n", "mode", "where"),
    [
        (False, 3, "a", "[1]"),
        (1, 3, "a", "[1]"),
        (None, 3, "a", "[1]"),
        (True, 4, "a", "[2]"),
        (True, 3.0, "a", "[2]"),
        (True, torch.tensor(3), "a", "[2]"),
        (True, 3, "b", "['mode']"),
    ],
)
def test_argument_that_was_compiled_in_has_one_value(nested: Any, flag: Any, n: Any, mode: Any, where: str) -> None:
    model, _, pair = nested
    with pytest.raises(reweft.MismatchError) as error:
        model(pair, flag, n, mode=mode, extra=None)
    assert_says(error, where, "was compiled in as")
    assert_hints(error)


def test_another_structure_is_refused(nested: Any) -> None:
    model, _, pair = nested
    cases: list[tuple[Any, dict[str, Any]]] = [
        ((pair, True), {"mode": "a", "extra": None}),
        ((pair, True, 3), {"mode": "a"}),
        (({"x": pair["x"]}, True, 3), {"mode": "a", "extra": None}),
        (((pair["x"], pair["z"]), True, 3), {"mode": "a", "extra": None}),
        ((pair, True, 3, "a", None), {}),
    ]
    for args, kwargs in cases:
        with pytest.raises(reweft.UsageError, match=r"called with \(.*\), the program takes \("):
            model(*args, **kwargs)


def test_floats_are_compared_bit_for_bit() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return torch.atan2(x * 0, x * 0 + by)

    model, x = rt.trace(Scaled().eval(), (torch.ones(3), -0.0)), torch.ones(3)
    model(x, -0.0)
    with pytest.raises(reweft.MismatchError):
        model(x, 0.0)
    with pytest.raises(reweft.MismatchError):
        model(x, 0.1)


def test_call_specification_survives_save_and_load(nested: Any, tmp_path: Any) -> None:
    model, _, pair = nested
    rt.save(model, tmp_path / "x.pt2")
    loaded = rt.load(tmp_path / "x.pt2")
    wanted = model(pair, True, 3, mode="a", extra=None)
    found = loaded(pair, True, 3, mode="a", extra=None)
    assert_same(found["y"], wanted["y"])
    assert found["row"][1:] == wanted["row"][1:]
    with pytest.raises(reweft.MismatchError):
        loaded(pair, False, 3, mode="a", extra=None)


def test_argument_that_no_program_takes_is_refused_when_it_is_traced() -> None:
    class Complex(nn.Module):
        def forward(self, x: torch.Tensor, by: complex) -> torch.Tensor:
            return x * by.real

    with pytest.raises((reweft.UnsupportedError, ValueError), match="complex"):
        rt.trace(Complex().eval(), (torch.ones(3), 1 + 2j))


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_lists_and_tuples() -> None:
    class Pairs(nn.Module):
        def forward(self, pair: Any, rest: list[torch.Tensor]) -> Any:
            return [pair[0] - pair[1], rest[0] * 2]

    args = ((torch.randn(3), torch.randn(3)), [torch.randn(2)])
    model = rt.trace(Pairs().eval(), args)
    assert_same(model(*args), Pairs()(*args))
    with pytest.raises(reweft.UsageError, match=r"called with \(.*\), the program takes \("):
        model(list(args[0]), args[1])
    with pytest.raises(reweft.UnsupportedError, match="Point") as error:
        rt.trace(Pairs().eval(), (Point(*args[0]), args[1]))
    assert_hints(error)
