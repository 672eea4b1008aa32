"""Tensors of several parts that contradict each other: each part is checked by itself, and nothing is made of them."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

import reweft
from opcodes import zipped
from support import assert_says, raw, saved_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that these kinds are in beta


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    """The file with other opcodes in its pickle."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("/data.pkl"))
    assert old in records[pickled]
    records[pickled] = records[pickled].replace(old, new, 1)
    return zipped(records)


def coo(*indices: int) -> bytes:
    values = torch.arange(float(len(indices)))
    tensor = torch.sparse_coo_tensor(torch.tensor([indices]), values, (3,), check_invariants=False)
    return saved_bytes({"w": tensor})


def quantised() -> bytes:
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.long)
    return saved_bytes({"w": torch.quantize_per_channel(torch.ones(3, 2), scales, zeros, 0, torch.quint8)})


@pytest.mark.parametrize("indices", [(0, 9), (0, -1), (2**63 - 1, 0), (0, 0)])
def test_indices_outside_the_shape_are_numbers_like_others(indices: tuple[int, ...], tmp_path: Path) -> None:
    """Only a reader that makes the dense tensor would write through them; conversions keep the parts as they are."""
    path, out = tmp_path / "x.pt", tmp_path / "x.safetensors"
    path.write_bytes(coo(*indices))
    reweft.convert(path, out)
    for checkpoint in (reweft.open(path), reweft.open(out)):
        assert list(checkpoint) == ["w.indices", "w.values"]
        assert bytes(checkpoint["w.indices"].read()) == raw(torch.tensor([indices]))


def test_zero_points_fewer_than_channels_stay_what_they_are() -> None:
    content = changed(quantised(), b"K\x03\x85q\x18", b"K\x02\x85q\x18")
    checkpoint = reweft.open(content)
    assert (checkpoint["w.scale"].shape, checkpoint["w.zero_point"].shape) == ((3,), (2,))
    assert checkpoint.non_tensors["w.axis"] == "int 0"


def good_coo() -> bytes:
    return coo(0, 1)


# A file, opcodes and others in their place, the key of the error and what it says.
LIES: dict[str, tuple[Callable[[], bytes], bytes, bytes, str, str]] = {
    "more values than stored": (good_coo, b"K\x02\x85", b"K\x03\x85", "w.values", "storage has 8"),
    "more integers than stored": (quantised, b"K\x03K\x02\x86", b"K\x03K\x03\x86", "w", "storage has 6"),
    "negative size": (good_coo, b"K\x01K\x02\x86", b"K\x01J\xff\xff\xff\xff\x86", "w.indices", "size is int -1"),
    "layout that is not known": (good_coo, b"torch.sparse_coo", b"torch.sparse_cox", "w", "sparse_cox"),
    "parts that are missing": (good_coo, b"\x89tq\x1f", b"\x891)q\x1f", "w", "of 0 parts"),
    "integers that are floats": (quantised, b"QUInt8Storage", b"FloatStorage", "w", "record has 6 bytes"),
    "integers without their own type": (quantised, b"QUInt8Storage", b"ByteStorage", "w", "quantised tensor of uint8"),
}


@pytest.mark.parametrize("name", LIES)
def test_part_that_contradicts_its_storage(name: str, tmp_path: Path) -> None:
    make, old, new, key, what = LIES[name]
    path = tmp_path / "x.pt"
    path.write_bytes(changed(make(), old, new))
    for mmap in (False, True):
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
            reweft.open(path, mmap=mmap)
        assert_says(error, path, f'"{key}"', what)


def test_packed_integers_fewer_than_their_shape(tmp_path: Path) -> None:
    value = torch.quantize_per_channel(torch.randn(3, 4), torch.ones(3), torch.zeros(3), 0, torch.quint4x2)
    content = changed(saved_bytes({"w": value}), b"K\x03K\x04\x86q\x08K\x04K\x01", b"K\x63K\x04\x86q\x08K\x04K\x01")
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(tmp_path / "x.pt")
    assert_says(error, tmp_path / "x.pt", '"w"', "needs 198 bytes")


def test_meta_tensor_of_any_size_has_no_bytes() -> None:
    content = saved_bytes({"m": torch.empty(1 << 40, device="meta"), "w": torch.ones(1)})
    checkpoint = reweft.open(content)
    assert "which has no data" in checkpoint.unreadable["m"]
    with pytest.raises(reweft.UnsupportedError):
        _ = checkpoint["m"]
