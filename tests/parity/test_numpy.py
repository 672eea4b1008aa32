"""`TensorInfo.numpy`: the values, without a copy where the file is mapped, and never writable."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reweft
from reweft.torch import checkpoint_of
from support import assert_hints, assert_says, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DTYPES = [
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "complex128", "bool",
    "uint16", "uint32", "uint64",
]  # fmt: skip

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda table: table,
    "transposed": lambda table: table.t(),
    "slice": lambda table: table[1:, 1:3],
    "expanded": lambda table: table[:1].expand(3, 4),
    "scalar": lambda table: table[1, 2],
    "empty": lambda table: table[:0],
    "every_second": lambda table: table[:, ::2],
}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: str, layout: str, mmap: bool, tmp_path: Path) -> None:  # noqa: FBT001
    table = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    path = save({"x": LAYOUTS[layout](table)}, tmp_path / "x.pt")
    wanted = torch.load(path)["x"].numpy()
    array = reweft.open(path, mmap=mmap)["x"].numpy()
    assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
    assert np.array_equal(array, wanted)
    assert not array.flags.writeable
    if mmap and wanted.size:
        assert array.strides == wanted.strides


def test_mapped_arrays_are_the_files_own_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.randn(3), "b": torch.randn(5)}, tmp_path / "x.safetensors")
    for path in (save({"a": torch.randn(3), "b": torch.randn(5)}, tmp_path / "x.pt"), tmp_path / "x.safetensors"):
        checkpoint = reweft.open(path, mmap=True)
        one, other = checkpoint["b"].numpy(), checkpoint["b"].numpy()
        assert one.__array_interface__["data"] == other.__array_interface__["data"]
        assert not one.flags.owndata


def test_read_arrays_are_their_own(tmp_path: Path) -> None:
    info = reweft.open(save({"a": torch.randn(3)}, tmp_path / "x.pt"))["a"]
    assert info.numpy().__array_interface__["data"] != info.numpy().__array_interface__["data"]


def test_array_outlives_its_checkpoint(tmp_path: Path) -> None:
    value = torch.randn(100_000)
    array = reweft.open(save({"a": value}, tmp_path / "x.pt"), mmap=True)["a"].numpy()
    (tmp_path / "x.pt").unlink()
    assert np.array_equal(array, value.numpy())


def test_arrays_cannot_be_made_writable(tmp_path: Path) -> None:
    path = save({"a": torch.randn(3)}, tmp_path / "x.pt")
    for mmap in (False, True):
        array = reweft.open(path, mmap=mmap)["a"].numpy()
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        assert reweft.open(path)["a"].read().readonly


def test_tensors_in_memory_are_seen_without_a_copy() -> None:
    value = torch.randn(4, 5)
    array = checkpoint_of({"x": value.t()})["x"].numpy()
    assert array.__array_interface__["data"][0] == value.data_ptr()
    assert np.array_equal(array, value.t().numpy())


def test_tensors_in_memory_of_one_storage() -> None:
    whole = torch.arange(12, dtype=torch.int16).view(3, 4)
    found = checkpoint_of(
        {"whole": whole, "row": whole[1], "turned": whole.t()[2:], "none": whole[:0], "other": whole + 1}
    )
    assert all(
        np.array_equal(found[key].numpy(), value) for key, value in (("row", whole[1]), ("turned", whole.t()[2:]))
    )
    assert found["whole"].storage == found["row"].storage
    assert found["whole"].storage != found["other"].storage
    assert found["none"].shape == (0, 4)


def test_storages_that_begin_at_one_place_are_not_taken_for_one() -> None:
    # Arrays that are passed to torch make storages of any length over the same memory.
    array = np.arange(8, dtype=np.float32)
    found = checkpoint_of({"short": torch.from_numpy(array[:2]), "long": torch.from_numpy(array)})
    assert np.array_equal(found["long"].numpy(), array)
    assert np.array_equal(found["short"].numpy(), array[:2])


def test_tensors_in_memory_outlive_their_tensors() -> None:
    value = torch.full((1 << 20,), 3.0)
    found = checkpoint_of({"x": value})
    # Another storage for the tensor, and no other owner of the first one.
    value.data = torch.zeros(4)
    del value
    gc.collect()
    others = [torch.full((1 << 20,), 7.0) for _ in range(4)]
    assert others
    assert np.all(found["x"].numpy() == 3.0)


def test_bytes_and_arrays_agree(tmp_path: Path) -> None:
    info = reweft.open(save({"a": torch.randn(4, 3).t()}, tmp_path / "x.pt"), mmap=True)["a"]
    assert bytes(info.read()) == info.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_dtype_that_numpy_lacks(dtype: str, tmp_path: Path) -> None:
    path = save({"x": torch.zeros(4, dtype=getattr(torch, dtype))}, tmp_path / "x.pt")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.open(path)["x"].numpy()
    assert_says(error, path, "x", dtype)
    assert_hints(error)


def test_numpy_reads_a_damaged_record_as_an_error(tmp_path: Path) -> None:
    path = save({"x": torch.full((1000,), 1.5)}, tmp_path / "x.pt")
    data = path.read_bytes()
    at = data.index(torch.full((8,), 1.5).numpy().tobytes()) + 80
    path.write_bytes(data[:at] + b"\xee" + data[at + 1 :])
    for mmap in (False, True):
        with pytest.raises(reweft.FormatError, match="CRC"):
            reweft.open(path, mmap=mmap)["x"].numpy()
