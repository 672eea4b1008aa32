"""What `trace` can be asked for beside the module and its arguments."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import assert_same

if TYPE_CHECKING:
    from pathlib import Path


def small() -> tuple[nn.Module, torch.Tensor]:
    return models.seeded(models.Small, 0), torch.randn(2, 16)


def test_work_directory_keeps_the_sources(tmp_path: Path) -> None:
    module, x = small()
    rt.trace(module, x, compiler_workdir=tmp_path / "work", options={"max_autotune": False})
    names = {path.name for path in (tmp_path / "work").iterdir()}
    assert any(name.endswith(".wrapper.cpp") for name in names)
    assert "linear" in (tmp_path / "work" / "program.txt").read_text()
    assert json.loads((tmp_path / "work" / "options.json").read_text())["max_autotune"] is False


def test_compiler_arguments() -> None:
    module, x = small()
    model = rt.trace(module, x, compiler_args="-O0")
    with torch.no_grad():
        torch.testing.assert_close(model(x), module(x))
    with pytest.raises(reweft.UnsupportedError, match="-ffast-math"):
        rt.trace(module, x, compiler_args=["-O0", "-ffast-math"])


@pytest.mark.parametrize(
    "option",
    [
        {"freezing": True},
        {"always_keep_tensor_constants": False},
        {"aot_inductor.package_constants_in_so": True},
        {"cpp.dynamic_threads": False},
    ],
    ids=str,
)
def test_option_that_would_bake_weights_is_refused(option: dict[str, object]) -> None:
    module, x = small()
    with pytest.raises(reweft.UsageError, match=next(iter(option))):
        rt.trace(module, x, options=option)


def test_another_device_is_refused() -> None:
    module, x = small()
    with pytest.raises(reweft.UsageError, match="cuda"):
        rt.trace(module, x, device="cuda")
    assert rt.trace(module, x, device="cpu").refittable().unrefittable == {}


def test_package_without_weights(tmp_path: Path) -> None:
    module, x = small()
    model = rt.trace(module, x, inline_weights=False)
    # What was traced runs; what is saved is filled when it is loaded.
    with torch.no_grad():
        torch.testing.assert_close(model(x), module(x))
    rt.save(model, tmp_path / "x.pt2")
    unfilled = rt.load(tmp_path / "x.pt2")
    with pytest.raises(reweft.RunError):
        unfilled(x)
    assert_same(rt.load(tmp_path / "x.pt2", weights=module)(x), model(x))


def test_strict_refuses_what_cannot_be_replaced() -> None:
    """Nothing is baked in by a trace, so that a strict one of an ordinary module succeeds."""
    module, x = small()
    assert rt.trace(module, x, strict=True).refittable().unrefittable == {}


def test_partial_sums_do_not_depend_on_the_number_of_threads() -> None:
    """Loops compiled for a number of threads write past their sums with more of them."""

    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x).sum()

    x = torch.randn(1 << 20)
    before = torch.get_num_threads()
    model = rt.trace(Total().eval(), x)
    try:
        for count in (1, 2, 5, 8):
            torch.set_num_threads(count)
            torch.testing.assert_close(model(x), (x * x).sum(), rtol=1e-4, atol=1e-2)
    finally:
        torch.set_num_threads(before)
