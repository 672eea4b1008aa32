"""Sizes that vary: within what the program was compiled for they are right, outside they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import models
import reweft
import reweft.torch as rt
from support import assert_says


class Sum(nn.Module):
    """Two inputs with a size in common, and results that are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.fc(x) + y, x.shape[0], x.shape[0] * 2


@pytest.fixture(scope="module")
def summed() -> rt.CompiledModule:
    batch = Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    return rt.trace(models.seeded(Sum, 0), (torch.randn(8, 4), torch.randn(8, 4)), dynamic_shapes=shapes)


@pytest.mark.parametrize("size", [2, 3, 8, 63, 64])
def test_every_size_in_the_range(summed: rt.CompiledModule, size: int) -> None:
    inputs = (torch.randn(size, 4), torch.randn(size, 4))
    for seed in (0, 1):
        module = models.seeded(Sum, seed)
        rt.replace_weights(summed, module)
        with torch.no_grad():
            torch.testing.assert_close(summed(*inputs), module(*inputs))
    assert summed(*inputs)[1:] == (size, 2 * size)


@pytest.mark.parametrize(
    ("x", "y", "parts"),
    [
        ((1, 4), (1, 4), ['"x"', "dim 0", "is 1", "2 to 64"]),
        ((65, 4), (65, 4), ['"x"', "dim 0", "is 65", "2 to 64"]),
        ((5, 4), (6, 4), ['"y"', "dim 0", "is 6", "takes 5"]),
        ((5, 3), (5, 4), ['"x"', "dim 1", "is 3", "takes 4"]),
        ((5, 4, 1), (5, 4), ['"x"', "3 dimensions"]),
    ],
)
def test_sizes_that_the_program_was_not_compiled_for(
    summed: rt.CompiledModule, x: tuple[int, ...], y: tuple[int, ...], parts: list[str]
) -> None:
    with pytest.raises(reweft.MismatchError) as error:
        summed(torch.randn(x), torch.randn(y))
    assert_says(error, *parts)


def test_other_strides_are_laid_out_again(summed: rt.CompiledModule) -> None:
    x, y = torch.randn(4, 6).t(), torch.randn(12, 4)[::2]
    module = models.seeded(Sum, 1)
    rt.replace_weights(summed, module)
    with torch.no_grad():
        torch.testing.assert_close(summed(x, y), module(x, y))


def test_what_export_assumed_beside_ranges() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x[1:] + y[::2]

    auto = {0: Dim.AUTO, 1: Dim.AUTO}
    model = rt.trace(Halves().eval(), (torch.randn(8, 4), torch.randn(14, 4)), dynamic_shapes={"x": auto, "y": auto})
    for rows, other in [(5, 8), (5, 7), (9, 16)]:
        x, y = torch.randn(rows, 3), torch.randn(other, 3)
        torch.testing.assert_close(model(x, y), Halves()(x, y))
    for rows, other in [(5, 9), (5, 6), (2, 2)]:
        with pytest.raises(reweft.MismatchError):
            model(torch.randn(rows, 3), torch.randn(other, 3))


def test_ranges_survive_save_and_load(summed: rt.CompiledModule, tmp_path: Any) -> None:
    rt.save(summed, tmp_path / "x.pt2")
    loaded = rt.load(tmp_path / "x.pt2")
    assert loaded(torch.randn(7, 4), torch.randn(7, 4))[1:] == (7, 14)
    with pytest.raises(reweft.MismatchError):
        loaded(torch.randn(65, 4), torch.randn(65, 4))


def test_sequence_length_of_an_embedding() -> None:
    module = models.seeded(models.Tied, 0)
    model = rt.trace(module, torch.arange(6).reshape(2, 3), dynamic_shapes=({1: Dim("length", min=2, max=16)},))
    for length in (2, 5, 16):
        tokens = torch.randint(20, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), module(tokens))
    with pytest.raises(reweft.MismatchError):
        model(torch.randint(20, (2, 17)))


def test_number_that_varies_is_refused() -> None:
    class Repeat(nn.Module):
        def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
            return x * n

    with pytest.raises(reweft.UnsupportedError, match="varies"):
        rt.trace(Repeat().eval(), (torch.randn(3), 3), dynamic_shapes={"x": None, "n": Dim.DYNAMIC})
