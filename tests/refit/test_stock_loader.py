"""What torch's own loader makes of our packages, and what we make of packages that torch made without us."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

import models
import reweft
import reweft.torch as rt
from support import assert_hints, assert_same, assert_says, leftovers, raw, save, save_state, stock

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package


@pytest.mark.parametrize("name", ["digits", "tied", "mixed", "half_width", "views", "recurrent", "weightless"])
def test_a_traced_package_runs_in_stock_torch(name: str, request: pytest.FixtureRequest) -> None:
    package: Package = request.getfixturevalue(name)
    assert_same(stock(package.path, *package.inputs), package.load()(*package.inputs))
    with zipfile.ZipFile(package.path) as archive:
        assert archive.testzip() is None


def test_a_traced_package_lists_the_modules_own_names(digits: Package) -> None:
    loaded = torch._inductor.aoti_load_package(str(digits.path))
    wanted = {key for key in digits.module(0).state_dict() if not key.endswith("num_batches_tracked")}
    assert set(loaded.get_constant_fqns()) == wanted


def test_refit_agrees_with_load_constants(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    loaded = torch._inductor.aoti_load_package(str(digits.path))
    state = {key: value for key, value in torch.load(digits_b).items() if "num_batches" not in key}
    loaded.load_constants(state, check_full_update=True)
    reweft.refit(digits.path, digits_b, out=tmp_path / "b.pt2")
    assert_same(loaded(*digits.inputs), stock(tmp_path / "b.pt2", *digits.inputs))


def test_refit_is_bit_for_bit_what_a_compilation_of_the_new_weights_gives(
    digits: Package, digits_b: Path, tmp_path: Path
) -> None:
    compiled = rt.trace(digits.module(1), digits.inputs)
    reweft.refit(digits.path, digits_b, out=tmp_path / "b.pt2")
    assert_same(rt.load(tmp_path / "b.pt2")(*digits.inputs), compiled(*digits.inputs))


class TestWeightsInTheLibrary:
    """torch's default: what is a slot can be replaced, what went into the code blocks it."""

    def test_refit_is_refused_with_a_hint(self, stock_embedded: Package, tmp_path: Path) -> None:
        checkpoint = save_state(stock_embedded.module(1), tmp_path / "b.pt")
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(stock_embedded.path, checkpoint, out=tmp_path / "b.pt2")
        assert_says(error, stock_embedded.path, "fc.bias", "compiled into the code")
        assert_hints(error)
        assert not (tmp_path / "b.pt2").exists()
        assert leftovers(tmp_path) == []

    def test_verify_does_not_say_equal(self, stock_embedded: Package, tmp_path: Path) -> None:
        checkpoint = save_state(stock_embedded.module(0), tmp_path / "a.pt")
        report = reweft.verify(stock_embedded.path, checkpoint, allow_unused=True, allow_missing=True)
        assert not report.equal

    def test_live_load_is_refused_with_a_hint(self, stock_embedded: Package) -> None:
        with pytest.raises(reweft.UnsupportedError) as error:
            rt.load(stock_embedded.path)
        assert_says(error, stock_embedded.path)
        assert_hints(error)


class TestBakedBias:
    """torch's default with the weights beside the library: the small bias is in the code."""

    def test_torch_itself_gives_wrong_outputs(self, stock_blob: Package) -> None:
        """Why all this is checked: no error, and the bias of the old weights."""
        loaded = torch._inductor.aoti_load_package(str(stock_blob.path))
        fqns = loaded.get_constant_fqns()
        assert fqns == ["fc.weight"]
        loaded.load_constants({"fc.weight": stock_blob.module(1).state_dict()["fc.weight"]}, check_full_update=True)
        assert not torch.allclose(loaded(*stock_blob.inputs), stock_blob.eager(1))

    @pytest.mark.parametrize("allow_unused", [False, True])
    def test_key_is_reported_as_baked(
        self,
        allow_unused: bool,  # noqa: FBT001
        stock_blob: Package,
        tmp_path: Path,
    ) -> None:
        checkpoint = save_state(stock_blob.module(1), tmp_path / "b.pt")
        plan = reweft.plan(stock_blob.path, checkpoint, allow_unused=allow_unused)
        (finding,) = [finding for finding in plan.findings if finding.blocking]
        assert (finding.kind, finding.key) == ("baked", "fc.bias")
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(stock_blob.path, checkpoint, out=tmp_path / "b.pt2", allow_unused=allow_unused)
        assert_says(error, stock_blob.path, checkpoint, "fc.bias", "always_keep_tensor_constants")
        assert_hints(error)
        assert not (tmp_path / "b.pt2").exists()

    def test_the_weight_alone_is_refitted(self, stock_blob: Package, tmp_path: Path) -> None:
        state = {**stock_blob.module(0).state_dict(), "fc.weight": stock_blob.module(1).state_dict()["fc.weight"]}
        checkpoint = save({"fc.weight": state["fc.weight"]}, tmp_path / "b.pt")
        out = tmp_path / "b.pt2"
        reweft.refit(stock_blob.path, checkpoint, out=out)
        module = models.Small().eval()
        module.load_state_dict(state)
        assert torch.allclose(stock(out, *stock_blob.inputs), module(*stock_blob.inputs), rtol=1e-6, atol=1e-6)
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
            blob = next(name for name in archive.namelist() if name.endswith("weights.blob"))
            assert archive.read(blob) == raw(state["fc.weight"])

    def test_no_op_is_byte_identical(self, stock_blob: Package, tmp_path: Path) -> None:
        checkpoint = save({"fc.weight": stock_blob.module(0).state_dict()["fc.weight"]}, tmp_path / "a.pt")
        reweft.refit(stock_blob.path, checkpoint, out=tmp_path / "a.pt2")
        assert (tmp_path / "a.pt2").read_bytes() == stock_blob.path.read_bytes()

    def test_live_load_without_a_manifest_is_refused(self, stock_blob: Package) -> None:
        with pytest.raises(reweft.UnsupportedError, match="manifest") as error:
            rt.load(stock_blob.path)
        assert_hints(error)
