"""Formats beside the zip archive of a state_dict, and tensors that have no dense form: parity with `torch.load`."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reweft
from support import assert_says, raw

FIXTURES = Path(__file__).parents[2] / "fixtures/checkpoints"

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def of(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (4, 6), generator=generator).to(dtype) * (1 if dtype == torch.bool else 3)


def legacy(value: object, path: Path, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return path


def assert_equal(checkpoint: reweft.Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert checkpoint.unreadable == {}
    assert list(checkpoint) == list(wanted)
    for key, value in wanted.items():
        info = checkpoint[key]
        assert (info.shape, info.strides) == (tuple(value.shape), value.stride()), key
        assert bytes(info.read()) == raw(value), key


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_legacy_stream(protocol: int, tmp_path: Path) -> None:
    base = torch.randn(5, 4)
    state = {str(dtype): of(dtype) for dtype in DTYPES}
    state |= {"t": base.t(), "slice": base[1:3, 1:], "expanded": base[:1].expand(3, 4), "empty": torch.empty(0, 2)}
    path = legacy(state, tmp_path / "x.pt", protocol)
    for mmap in (False, True):
        checkpoint = reweft.open(path, mmap=mmap)
        assert checkpoint.format == "torch legacy"
        assert_equal(checkpoint, torch.load(path, weights_only=protocol == 2))
    assert checkpoint["t"].storage == checkpoint["slice"].storage


def test_legacy_stream_with_a_large_pickle(tmp_path: Path) -> None:
    """The pickles take more than the first piece that is read."""
    state = {f"{'long.' * 20}{number}": torch.full((3,), float(number)) for number in range(9000)}
    checkpoint = reweft.open(legacy(state, tmp_path / "x.pt"))
    assert len(checkpoint) == 9000
    assert_equal(checkpoint, state)


def test_legacy_stream_of_a_whole_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    checkpoint = reweft.open(legacy(module, tmp_path / "x.pt"))
    assert_equal(checkpoint, module.state_dict())


def test_legacy_stream_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = legacy({"a": torch.randn(4), "b": torch.randn(3)}, tmp_path / "x.pt").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(reweft.ReweftError):
            _ = [info.read() for info in reweft.open(tmp_path / "cut.pt").values()]


def big_endian(path: Path, sizes: dict[str, int]) -> None:
    """Turn the bytes of every element in a saved file, and say so in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(out, "w") as turned:
        for entry in archive.infolist():
            content = archive.read(entry)
            folder, _, name = entry.filename.partition("/")
            if name == "byteorder":
                content = b"big"
            elif name in sizes:
                size = sizes[name]
                content = b"".join(content[at : at + size][::-1] for at in range(0, len(content), size))
            turned.writestr(zipfile.ZipInfo(f"{folder}/{name}"), content)
    path.write_bytes(out.getvalue())


@pytest.mark.parametrize("dtype", DTYPES)
def test_big_endian_file(dtype: torch.dtype, tmp_path: Path) -> None:
    value, path = of(dtype), tmp_path / "x.pt"
    torch.save({"w": value, "t": value.t()}, path)
    big_endian(path, {"data/0": value.element_size() // (2 if dtype.is_complex else 1)})
    theirs = torch.load(path)
    assert torch.equal(theirs["w"], value)
    for mmap in (False, True):
        assert_equal(reweft.open(path, mmap=mmap), theirs)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(3, 3), nn.Identity()])
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_parameter("absent", None)
        self.tied = self.body[0].weight


@pytest.mark.parametrize("protocol", [2, 4])
def test_whole_module_is_read_as_its_state_dict(protocol: int, tmp_path: Path) -> None:
    module = Net()
    torch.save({"model": module, "epoch": 1}, tmp_path / "x.pt", pickle_protocol=protocol)
    checkpoint = reweft.open(tmp_path / "x.pt", top_level_key="model")
    assert_equal(checkpoint, module.state_dict())
    assert checkpoint["tied"].storage == checkpoint["body.0.weight"].storage
    assert checkpoint.non_tensors["cache"] == "buffer that is no part of the state_dict"


def test_bare_pickle(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"lr": 0.1, "names": ["a", "b"]}, protocol=4))
    checkpoint = reweft.open(tmp_path / "x.pkl")
    assert (checkpoint.format, len(checkpoint)) == ("pickle", 0)
    assert checkpoint.non_tensors == {"lr": "float 0.1", "names": "list of 2"}


PARTS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {}


def part(name: str, value: torch.Tensor, **parts: torch.Tensor) -> None:
    PARTS[name] = (value, parts)


with warnings.catch_warnings():
    # torch says of sparse and quantised tensors that they are in beta.
    warnings.simplefilter("ignore")
    dense = torch.tensor([[0.0, 1.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 4.0], [0.0, 0.0, 5.0, 0.0]])
    coo = dense.to_sparse().coalesce()
    part("coo", coo, indices=coo.indices(), values=coo.values())
    csr = dense.to_sparse_csr()
    part("csr", csr, crow_indices=csr.crow_indices(), col_indices=csr.col_indices(), values=csr.values())
    csc = dense.to_sparse_csc()
    part("csc", csc, ccol_indices=csc.ccol_indices(), row_indices=csc.row_indices(), values=csc.values())
    bsr = dense.to_sparse_bsr((2, 2))
    part("bsr", bsr, crow_indices=bsr.crow_indices(), col_indices=bsr.col_indices(), values=bsr.values())
    bsc = dense.to_sparse_bsc((2, 2))
    part("bsc", bsc, ccol_indices=bsc.ccol_indices(), row_indices=bsc.row_indices(), values=bsc.values())
    q8 = torch.quantize_per_tensor(dense, 0.1, 3, torch.qint8)
    part("per_tensor", q8, int_repr=q8.int_repr())
    qc = torch.quantize_per_channel(dense, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4).long(), 0, torch.quint8)
    scales, zero_points = qc.q_per_channel_scales(), qc.q_per_channel_zero_points()
    part("per_channel", qc, int_repr=qc.int_repr(), scale=scales, zero_point=zero_points)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that these kinds are in beta
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_what_has_no_dense_form_is_there_by_its_parts(name: str, form: str, tmp_path: Path) -> None:
    value, parts = PARTS[name]
    path = tmp_path / "x.pt"
    torch.save({"plain": torch.ones(1), "w": value}, path, _use_new_zipfile_serialization=form == "zip")
    checkpoint = reweft.open(path)
    assert checkpoint.unreadable == {}
    assert list(checkpoint) == ["plain", *(f"w.{part}" for part in parts)]
    for key, wanted in parts.items():
        assert bytes(checkpoint[f"w.{key}"].read()) == raw(wanted), key
    assert "tensor" in checkpoint.non_tensors["w"]


def test_scale_of_a_quantised_tensor_is_listed(tmp_path: Path) -> None:
    torch.save({"w": PARTS["per_tensor"][0]}, tmp_path / "x.pt")
    listed = reweft.open(tmp_path / "x.pt").non_tensors
    assert listed["w"] == "per_tensor_affine quantised tensor of qint8"
    assert (listed["w.scale"], listed["w.zero_point"]) == ("float 0.1", "int 3")


class Scaled(torch.Tensor):
    """A subclass, which may mean more than its bytes."""


def test_subclass_is_read_as_its_payload_with_a_notice(tmp_path: Path) -> None:
    value = torch.randn(3)
    torch.save({"w": value.as_subclass(Scaled), "b": nn.Buffer(value + 1)}, tmp_path / "x.pt")
    checkpoint = reweft.open(tmp_path / "x.pt")
    assert_equal(checkpoint, {"w": value, "b": value + 1})
    (notice,) = checkpoint.notices
    assert "Scaled" in notice


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_storage_without_a_tensor_is_a_tensor_of_one_dimension(form: str, tmp_path: Path) -> None:
    value, other = torch.randn(4, 3), torch.arange(5)
    held: dict[str, Any] = {"untyped": other.untyped_storage()}
    held |= {"typed": value.storage(), "none": torch.empty(0).storage()}  # type: ignore[no-untyped-call]
    path = tmp_path / "x.pt"
    torch.save(held, path, _use_new_zipfile_serialization=form == "zip")
    checkpoint = reweft.open(path)
    assert checkpoint.unreadable == {}
    assert (checkpoint["typed"].dtype, checkpoint["typed"].shape) == ("float32", (12,))
    assert (checkpoint["untyped"].dtype, checkpoint["untyped"].shape) == ("uint8", (40,))
    assert checkpoint["none"].shape == (0,)
    assert bytes(checkpoint["typed"].read()) == raw(value)
    assert bytes(checkpoint["untyped"].read()) == raw(other)
    assert any("no tensor is around" in notice for notice in checkpoint.notices)


def test_storage_alone(tmp_path: Path) -> None:
    value = torch.arange(3)
    torch.save(value.untyped_storage(), tmp_path / "x.pt")
    assert bytes(reweft.open(tmp_path / "x.pt")["tensor"].read()) == raw(value)


def test_legacy_view_that_leaves_its_storage_is_refused(tmp_path: Path) -> None:
    """Old files name views of storages; a tensor must lie within its view, not only within the storage."""
    data = legacy({"a": torch.arange(8.0)}, tmp_path / "x.pt").read_bytes()
    # The persistent id ends in (..., numel, None); here the view is elements 2 and 3.
    start = data.index(b"K\x08Nt") if b"K\x08Nt" in data else -1
    assert start > 0
    view = b"X\x01\0\0\0vK\x02K\x02\x87"
    (tmp_path / "y.pt").write_bytes(data[: start + 2] + view + data[start + 3 :])
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "y.pt")
    with pytest.raises(reweft.FormatError, match="storage has 8"):
        reweft.open(tmp_path / "y.pt")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("name", ["state_dict.pt", "legacy.pt", "tar_of_2016.pt"])
def test_bytes_are_read_as_their_file_is(kind: type, name: str) -> None:
    path = FIXTURES / name
    content = path.read_bytes()
    given = kind(bytearray(content) if kind is memoryview else content)
    opened, filed = reweft.open(given), reweft.open(path)
    if kind is bytearray:
        given[:] = bytes(len(given))
    assert list(opened) == list(filed)
    for key, info in filed.items():
        assert bytes(opened[key].read()) == bytes(info.read())
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(content[: len(content) // 5])
    assert_says(error, "<bytes>")
