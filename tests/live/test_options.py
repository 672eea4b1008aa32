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
from reweft import _core
from support import assert_hints, assert_same, assert_says, save_state, with_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package


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


class TestRefitRules:
    """`immutable_weights` and `identical_weights`."""

    @staticmethod
    def traced(option: str, path: Path) -> tuple[nn.Module, torch.Tensor, Path]:
        module, x = small()
        rt.save(rt.trace(module, x, options={option: True}), path)
        return module, x, path

    @staticmethod
    def refused(package: Path, module: nn.Module, kind: str, *parts: str) -> None:
        """Every way to other weights is an error that says the same, and changes nothing."""
        weights, before = save_state(module, package.with_name("new.pt")), package.read_bytes()
        model, x = rt.load(package), torch.ones(2, 16)
        output = model(x)
        assert [finding.kind for finding in reweft.plan(package, weights).findings] == [kind]
        for refit in (
            lambda: reweft.refit(package, weights, out=package.with_name("out.pt2")),
            lambda: reweft.refit(package, weights, in_place=True),
            lambda: rt.replace_weights(model, module, strict=False, allow_cast=True),
            lambda: rt.replace_weights(model, weights),
            lambda: rt.refit_module_weights(model, module),
            lambda: rt.load(package, weights=weights),
        ):
            with pytest.raises(reweft.MismatchError) as error:
                refit()
            assert_says(error, *parts)
            assert_hints(error)
        assert package.read_bytes() == before
        assert not package.with_name("out.pt2").exists()
        assert_same(model(x), output)

    def test_immutable_weights_are_never_replaced(self, tmp_path: Path) -> None:
        module, x, package = self.traced("immutable_weights", tmp_path / "x.pt2")
        model = rt.load(package)
        assert model.refittable().rule == "never"
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x))
        # Not even by what they are.
        for other in (module, models.seeded(models.Small, 1)):
            self.refused(package, other, "immutable", "fc.weight", "immutable_weights", "keys for 2 slots", "none")
        # Saved and filled again it is the same package.
        rt.save(model, tmp_path / "program.pt2", inline_weights=False)
        filled = rt.load(tmp_path / "program.pt2", weights=module)
        assert_same(filled(x), model(x))
        with pytest.raises(reweft.MismatchError, match="immutable_weights"):
            rt.replace_weights(filled, module)
        with pytest.raises(reweft.MismatchError, match="identical_weights"):
            rt.load(tmp_path / "program.pt2", weights=models.seeded(models.Small, 1))

    def test_identical_weights_are_the_only_ones(self, tmp_path: Path) -> None:
        module, x, package = self.traced("identical_weights", tmp_path / "x.pt2")
        model = rt.load(package)
        assert model.refittable().rule == "identical"
        output = model(x)
        assert rt.replace_weights(model, module).slots == 2
        reweft.refit(package, save_state(module, tmp_path / "same.pt"), out=tmp_path / "same.pt2")
        assert (tmp_path / "same.pt2").read_bytes() == package.read_bytes()
        assert_same(rt.refit_module_weights(model, module, (x,), verify_output=True)(x), output)
        other = models.seeded(models.Small, 0)
        with torch.no_grad():
            other.fc.bias[3] += 1
        self.refused(package, other, "identical", "fc.bias", "identical_weights", "found blake3:", "wanted blake3:")

    def test_inspect_shows_it(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        _module, _x, package = self.traced("identical_weights", tmp_path / "x.pt2")
        assert _core.main(["reweft", "inspect", str(package)]) == 0
        assert "takes no other weights: traced with identical_weights\n" in capfd.readouterr().out
        assert _core.main(["reweft", "inspect", "--json", str(package)]) == 0
        assert json.loads(capfd.readouterr().out)["refit"] == "identical"
        stated = with_manifest(package, tmp_path / "never.pt2", lambda manifest: manifest.update(refit="never"))
        assert _core.main(["reweft", "inspect", str(stated)]) == 0
        assert "cannot be refitted: traced with immutable_weights\n" in capfd.readouterr().out

    def test_a_package_that_does_not_say_takes_any(self, digits: Package, tmp_path: Path) -> None:
        silent = with_manifest(digits.path, tmp_path / "x.pt2", lambda manifest: manifest.pop("refit"))
        model = rt.load(silent)
        assert model.refittable().rule == "any"
        assert rt.replace_weights(model, digits.module(1)).slots
        unknown = with_manifest(digits.path, tmp_path / "y.pt2", lambda manifest: manifest.update(refit="sometimes"))
        with pytest.raises(reweft.FormatError, match="sometimes"):
            rt.load(unknown)

    @pytest.mark.parametrize(
        "options", [{"immutable_weights": 1}, {"immutable_weights": True, "identical_weights": True}]
    )
    def test_options_that_make_no_sense(self, options: dict[str, object]) -> None:
        module, x = small()
        with pytest.raises(reweft.UsageError, match="immutable_weights"):
            rt.trace(module, x, options=options)


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
