"""Files that `numpy.load` reads: every record is what `numpy.save` writes."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_transfer import other_byte_order, rezipped, zoo

import reweft
from support import assert_hints, assert_says, leftovers, save, without_crc

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "complex128", "bool",
    "uint16", "uint32", "uint64",
]  # fmt: skip


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def assert_holds(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{key}.npy" for key in wanted]
        for info in archive.infolist():
            array = np.ascontiguousarray(wanted[info.filename.removesuffix(".npy")].numpy())
            expected = saved(array.reshape(wanted[info.filename.removesuffix(".npy")].shape))
            assert archive.read(info) == expected, info.filename
    with np.load(path) as loaded:
        for key, value in wanted.items():
            assert np.array_equal(loaded[key], value.numpy(), equal_nan=value.dtype.is_floating_point), key


def test_every_dtype_is_numpys(tmp_path: Path) -> None:
    noise = torch.randint(0, 2, (16 * 6,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = {name: noise[: 6 * getattr(torch, name).itemsize].clone().view(getattr(torch, name)) for name in DTYPES}
    reweft.convert(save(state, tmp_path / "x.pt"), tmp_path / "y.npz")
    assert_holds(tmp_path / "y.npz", state)


def test_every_shape_is_numpys(tmp_path: Path) -> None:
    state = {str(dim): torch.randn([2] * dim) for dim in range(12)}
    state |= {"none": torch.empty(0, 3), "long": torch.zeros(1, 123_456), "": torch.ones(2), "ключ/a b": torch.ones(1)}
    reweft.convert(save(state, tmp_path / "x.pt"), tmp_path / "y.npz")
    assert_holds(tmp_path / "y.npz", state)


def test_an_empty_state(tmp_path: Path) -> None:
    reweft.convert(save({}, tmp_path / "x.pt"), tmp_path / "y.npz")
    assert_holds(tmp_path / "y.npz", {})


@pytest.mark.parametrize("container", ["plain", "no_crc", "deflated", "big", "old", "mapped", "safetensors"])
def test_every_layout_and_size_arrives_from_every_container(container: str, tmp_path: Path) -> None:
    state, path = zoo(), tmp_path / "x.pt"
    if container == "big":
        state = {key: value for key, value in state.items() if value.element_size() > 1}
    if container == "safetensors":
        save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
        state = {key: state[key] for key in reweft.open(path)}
    elif container == "no_crc":
        without_crc(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container != "old")
    if container == "deflated":
        rezipped(path)
    if container == "big":
        other_byte_order(path)
        state = torch.load(path)
    reweft.convert(reweft.open(path, mmap=container == "mapped"), tmp_path / "y.npz", shared="duplicate")
    assert_holds(tmp_path / "y.npz", state)


def test_arrays_can_be_mapped_where_they_are(tmp_path: Path) -> None:
    reweft.convert(save(zoo(), tmp_path / "x.pt"), tmp_path / "y.npz", shared="duplicate")
    data = (tmp_path / "y.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "y.npz") as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            start = data.index(b"\x93NUMPY", info.header_offset)
            assert start % 64 == 0


def test_tensors_that_are_made_when_they_are_read(tmp_path: Path) -> None:
    weight = torch.randn(1 << 19).bfloat16()
    path = save({"w": weight, "n": torch.arange(3)}, tmp_path / "x.pt")
    reweft.convert(path, tmp_path / "y.npz", dtype="float32")
    assert_holds(tmp_path / "y.npz", {"w": weight.float(), "n": torch.arange(3)})


def test_shared_tensors_are_settled_as_for_safetensors(tmp_path: Path) -> None:
    weight = torch.randn(3)
    path = save({"a": weight, "tied": weight}, tmp_path / "x.pt")
    with pytest.raises(reweft.MismatchError) as error:
        reweft.convert(path, tmp_path / "y.npz")
    assert_says(error, path, '"a"', '"tied"', "npz")
    report = reweft.convert(path, tmp_path / "y.npz", shared="drop-aliases")
    assert report.dropped_aliases == {"tied": "a"}
    assert_holds(tmp_path / "y.npz", {"a": weight})


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"w": torch.ones(2).bfloat16()}, ('"w"', "bfloat16")),
        ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, ('"w"', "float8_e4m3fn")),
        ({"w": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)}, ('"w"', "bits8")),
        ({"a\0b": torch.ones(2)}, ("zero character",)),
        ({"a": torch.ones(2), "a.npy": torch.zeros(2)}, ('"a"', '"a.npy"')),
    ],
)
def test_what_numpy_would_not_give_back_is_refused(state: Any, said: tuple[str, ...], tmp_path: Path) -> None:
    path = save(state, tmp_path / "x.pt")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.convert(path, tmp_path / "y.npz")
    assert_says(error, path, *said)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "y.npz").exists()
    assert_hints(error)


def test_shards_are_refused(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(reweft.UsageError, match="npz is written as one file"):
        reweft.convert(path, tmp_path / "y.npz", max_shard_size="1GB")
