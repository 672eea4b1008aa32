"""`save_file` and `load_file` beside those of `safetensors.torch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import safetensors
import safetensors.torch
import torch

import reweft
import reweft.torch as rt
from modules import DTYPES, assert_equal

if TYPE_CHECKING:
    from pathlib import Path


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    raw = torch.randint(0, 2, (96,), dtype=torch.uint8)
    wanted = [dtype for dtype in DTYPES if dtype != torch.complex128]
    found = {str(dtype): raw.view(dtype).reshape(2, -1) if dtype != torch.bool else raw.bool() for dtype in wanted}
    return {key: value.clone() for key, value in found.items()} | {
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
    }


def test_either_reads_what_the_other_wrote(tmp_path: Path) -> None:
    found = tensors()
    rt.save_file(found, tmp_path / "ours.safetensors", {"epoch": "3", "note": "é"})
    safetensors.torch.save_file(found, tmp_path / "theirs.safetensors", {"epoch": "3", "note": "é"})
    for name in ("ours", "theirs"):
        path = tmp_path / f"{name}.safetensors"
        assert_equal(rt.load_file(path), found)
        assert_equal(dict(sorted(safetensors.torch.load_file(path).items())), dict(sorted(found.items())))
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"epoch": "3", "note": "é"}
        assert reweft.open(path).metadata == {"epoch": "3", "note": "é"}


def test_strided_tensors_are_written_in_row_major_order(tmp_path: Path) -> None:
    base = torch.rand(4, 6)
    found = {
        "t": base.t(),
        "columns": base.clone()[:, 2:4],
        "last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }
    with pytest.raises(ValueError, match="non contiguous"):
        safetensors.torch.save_file(found, tmp_path / "x.safetensors")
    rt.save_file(found, tmp_path / "x.safetensors")
    assert_equal(safetensors.torch.load_file(tmp_path / "x.safetensors"), found)


def test_shared_tensors_are_refused_by_name(tmp_path: Path) -> None:
    weight, path = torch.rand(3), tmp_path / "x.safetensors"
    rt.save_file({"a": weight}, path)
    before = path.read_bytes()
    with pytest.raises(reweft.MismatchError, match=r"'?\"?a.*b|b.*a") as error:
        rt.save_file({"a": weight, "b": weight}, path)
    assert "hint" in str(error.value)
    assert path.read_bytes() == before
    rt.save_file({"a": weight[:1], "b": weight[1:]}, path)
    assert_equal(rt.load_file(path), {"a": weight[:1], "b": weight[1:]})


def test_what_is_refused_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rt.save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    for bad in (
        {"a": torch.ones(2).to_sparse()},
        {"a": 3},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(1, dtype=torch.complex128)},
    ):
        with pytest.raises(reweft.UnsupportedError, match=r"a\b"):
            rt.save_file(bad, path)  # type: ignore[arg-type]
    with pytest.raises(reweft.UsageError, match="are texts"):
        rt.save_file({"a": torch.ones(2)}, path, {"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(reweft.UsageError, match="are texts"):
        rt.save_file({3: torch.ones(2)}, path)  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_takes_the_place_of_a_mapped_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rt.save_file({"a": torch.arange(5000.0)}, path)
    old = rt.load_file(path)["a"]
    rt.save_file({"a": torch.zeros(10)}, path)
    assert torch.equal(old, torch.arange(5000.0))
    old.add_(1)
    assert rt.load_file(path)["a"].tolist() == [0] * 10


def test_other_formats_and_devices(tmp_path: Path) -> None:
    state = {"a": torch.rand(3, 2).t(), "b": torch.rand(2)}
    state["tied"] = state["b"]
    torch.save(state, tmp_path / "x.pt")
    found = rt.load_file(tmp_path / "x.pt")
    assert_equal(found, state)
    assert found["a"].stride() == (1, 2)
    assert found["tied"].data_ptr() == found["b"].data_ptr()
    assert rt.load_file(tmp_path / "x.pt", "meta")["a"].is_meta
    assert rt.load_file(tmp_path / "x.pt", device="cpu")["a"].is_cpu
