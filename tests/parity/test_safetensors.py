"""Reading and writing safetensors, held against the `safetensors` package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import reweft
from support import assert_hints, assert_says, leftovers, raw, save

if TYPE_CHECKING:
    from pathlib import Path

# Every dtype that the `safetensors` package writes from torch.
DTYPES = [
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64", "bool", "bfloat16",
    "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "uint16", "uint32",
    "uint64",
]  # fmt: skip


def everything() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, of odd lengths, and some odd layouts and names."""
    noise = torch.randint(0, 2, (3 * 8 * 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = {name: noise[: 3 * getattr(torch, name).itemsize].view(getattr(torch, name)) for name in DTYPES}
    return {
        **{name: value.clone() for name, value in state.items()},
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        'ключ "quoted" \\ \t': torch.ones(1),
        "": torch.zeros(2),
    }


def blob(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of a header, as an object or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def row(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("mmap", [False, True])
def test_files_of_the_reference_are_read(tmp_path: Path, mmap: bool) -> None:  # noqa: FBT001
    state = everything()
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    checkpoint = reweft.open(tmp_path / "x.safetensors", mmap=mmap)
    assert checkpoint.format == "safetensors"
    assert set(checkpoint) == set(state)
    for key, value in state.items():
        info = checkpoint[key]
        assert (info.dtype, info.shape) == (str(value.dtype).removeprefix("torch."), tuple(value.shape))
        assert info.strides == value.stride()
        assert bytes(info.read()) == raw(value)
    assert checkpoint.metadata == {"format": "pt"}


def test_converted_files_load_with_the_reference(tmp_path: Path) -> None:
    state = everything()
    del state[""]  # its own test, in test_torch_load.py
    state["transposed"] = torch.randn(3, 4).t()
    state["channels_last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state["slice"] = torch.randn(10, 4)[3:7, 1:]
    state["expanded"] = torch.randn(3, 1).expand(3, 4)
    path = save(state, tmp_path / "x.pt")
    report = reweft.convert(path, tmp_path / "x.safetensors")
    loaded, wanted = load_file(tmp_path / "x.safetensors"), torch.load(path)
    assert set(loaded) == set(wanted)
    for key, value in wanted.items():
        assert (loaded[key].dtype, loaded[key].shape) == (value.dtype, value.shape)
        assert raw(loaded[key]) == raw(value), key
    assert report.tensors == len(state)
    assert report.nbytes == sum(value.numel() * value.element_size() for value in state.values())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"b": "ü", "a": '"', "c": ""}])
def test_conversion_of_a_reference_file_is_byte_identical(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file(everything(), tmp_path / "x.safetensors", metadata)
    reweft.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_conversion_of_our_own_file_is_byte_identical(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), tmp_path / "x.pt")
    reweft.convert(path, tmp_path / "1.safetensors")
    reweft.convert(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_metadata_is_kept_under_a_key_map(tmp_path: Path) -> None:
    save_file({"a.w": torch.ones(2)}, tmp_path / "x.safetensors", {"license": "MIT", "note": "ü"})
    keys = reweft.KeyMap([("^a", "b")])
    reweft.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", keys=keys)
    converted = reweft.open(tmp_path / "y.safetensors")
    assert converted.metadata == {"license": "MIT", "note": "ü"}
    assert list(converted) == ["b.w"]


def test_what_is_no_tensor_is_reported(tmp_path: Path) -> None:
    path = save({"state": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pt")
    report = reweft.convert(path, tmp_path / "x.safetensors")
    assert any("epoch" in item for item in report.not_carried)
    assert load_file(tmp_path / "x.safetensors").keys() == {"state.w"}


def test_empty_checkpoint(tmp_path: Path) -> None:
    report = reweft.convert(save({}, tmp_path / "x.pt"), tmp_path / "x.safetensors")
    assert report.tensors == 0
    assert load_file(tmp_path / "x.safetensors") == {}
    assert len(reweft.open(tmp_path / "x.safetensors")) == 0


@pytest.mark.parametrize("dtype", ["complex128", "complex32", "bits8"])
def test_dtype_that_the_format_lacks_is_refused(dtype: str, tmp_path: Path) -> None:
    value = torch.zeros(32, dtype=torch.uint8).view(getattr(torch, dtype))
    path = save({"ok": torch.ones(1), "w": value}, tmp_path / "x.pt")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.convert(path, tmp_path / "x.safetensors")
    assert_says(error, path, "w", dtype)
    assert_hints(error)
    assert not (tmp_path / "x.safetensors").exists()


class TestSharedTensors:
    """safetensors cannot say that tensors share bytes, so somebody has to decide."""

    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        weight = torch.randn(3, 2)
        return save({"head": weight, "other": torch.ones(2), "embedding": weight}, tmp_path / "x.pt")

    def test_refused_by_default_with_both_keys(self, tied: Path, tmp_path: Path) -> None:
        out = tmp_path / "x.safetensors"
        out.write_bytes(b"old")
        with pytest.raises(reweft.MismatchError) as error:
            reweft.convert(tied, out)
        assert_says(error, tied, "head", "embedding")
        assert_hints(error)
        assert out.read_bytes() == b"old"
        assert leftovers(tmp_path) == []

    def test_duplicated_when_asked(self, tied: Path, tmp_path: Path) -> None:
        report = reweft.convert(tied, tmp_path / "x.safetensors", shared="duplicate")
        loaded = load_file(tmp_path / "x.safetensors")
        assert torch.equal(loaded["head"], loaded["embedding"])
        assert report.dropped_aliases == {}

    def test_dropped_when_asked(self, tied: Path, tmp_path: Path) -> None:
        report = reweft.convert(tied, tmp_path / "x.safetensors", shared="drop-aliases")
        assert set(load_file(tmp_path / "x.safetensors")) == {"head", "other"}
        assert report.dropped_aliases == {"embedding": "head"}

    def test_overlap_is_no_alias(self, tmp_path: Path) -> None:
        base = torch.randn(10)
        path = save({"a": base[:6], "b": base[4:]}, tmp_path / "x.pt")
        for shared in ("error", "drop-aliases"):
            with pytest.raises(reweft.MismatchError) as error:
                reweft.convert(path, tmp_path / "x.safetensors", shared=shared)
            assert_says(error, "a", "b")
        reweft.convert(path, tmp_path / "x.safetensors", shared="duplicate")
        loaded = load_file(tmp_path / "x.safetensors")
        assert torch.equal(loaded["a"], base[:6])
        assert torch.equal(loaded["b"], base[4:])

    def test_columns_of_a_matrix_share_nothing(self, tmp_path: Path) -> None:
        base = torch.randn(50, 12)
        state = {"q": base[:, :4], "k": base[:, 4:8], "v": base[:, 8:], "even": torch.arange(9)[::2]}
        reweft.convert(save(state, tmp_path / "x.pt"), tmp_path / "x.safetensors")
        loaded = load_file(tmp_path / "x.safetensors")
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
        path = save({**state, "all": base}, tmp_path / "y.pt")
        with pytest.raises(reweft.MismatchError):
            reweft.convert(path, tmp_path / "x.safetensors", shared="drop-aliases")

    def test_a_tied_column_is_an_alias_beside_other_columns(self, tmp_path: Path) -> None:
        base = torch.randn(5, 12)
        path = save({"q": base[:, :4], "k": base[:, 4:8], "tied": base[:, 4:8]}, tmp_path / "x.pt")
        report = reweft.convert(path, tmp_path / "x.safetensors", shared="drop-aliases")
        assert report.dropped_aliases == {"tied": "k"}

    def test_an_overlap_hidden_by_another_tensor_is_found(self, tmp_path: Path) -> None:
        base = torch.randn(10)
        path = save({"all": base, "first": base[:2], "last": base[8:]}, tmp_path / "x.pt")
        with pytest.raises(reweft.MismatchError):
            reweft.convert(path, tmp_path / "x.safetensors", shared="drop-aliases")

    def test_neighbours_in_one_storage_share_nothing(self, tmp_path: Path) -> None:
        base = torch.randn(10)
        path = save({"a": base[:4], "b": base[4:], "e": base[2:2]}, tmp_path / "x.pt")
        reweft.convert(path, tmp_path / "x.safetensors")
        assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], base[4:])

    def test_unknown_choice(self, tied: Path, tmp_path: Path) -> None:
        with pytest.raises(reweft.UsageError, match="duplicate"):
            reweft.convert(tied, tmp_path / "x.safetensors", shared="guess")  # type: ignore[arg-type]


F32 = b"\x00\x00\x80\x3f"
DAMAGED = {
    "length_only": b"\x10\x00\x00\x00\x00\x00\x00\x00",
    "truncated_header": blob({"w": row("F32", [1], 0, 4)}, F32)[:20],
    "truncated_data": blob({"w": row("F32", [2], 0, 8)}, F32),
    "trailing_bytes": blob({"w": row("F32", [1], 0, 4)}, F32 + b"x"),
    "hole": blob({"a": row("F32", [1], 0, 4), "b": row("F32", [1], 8, 12)}, F32 * 3),
    "hole_at_the_start": blob({"a": row("F32", [1], 4, 8)}, F32 * 2),
    "overlap": blob({"a": row("F32", [2], 0, 8), "b": row("F32", [2], 4, 12)}, F32 * 3),
    "backwards": blob({"a": row("F32", [1], 4, 0)}, F32),
    "size_that_is_not_the_shape": blob({"w": row("F32", [2], 0, 4)}, F32),
    "shape_that_overflows": blob({"w": row("F32", [1 << 62, 1 << 62], 0, 4)}, F32),
    "negative_shape": blob({"w": row("F32", [-1], 0, 4)}, F32),
    "duplicate_key": blob(
        b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b"ab",
    ),
    "duplicate_metadata": blob(b'{"__metadata__":{},"__metadata__":{"a":"b"}}'),
    "duplicate_metadata_key": blob(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "duplicate_field": blob(b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"a"),
    "unknown_field": blob(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', b"a"),
    "metadata_that_is_no_text": blob(b'{"__metadata__":{"a":1}}'),
    "bad_utf8": blob(b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a"),
    "header_that_is_a_list": blob(b"{]"),
    "text_behind_the_header": blob(b"{} {}"),
    "part_of_a_byte": blob({"w": row("F4", [3], 0, 1)}, b"a"),
}


@pytest.mark.parametrize("defect", DAMAGED)
def test_damaged_file_is_refused(defect: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(DAMAGED[defect])
    for mmap in (False, True):
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
            reweft.open(path, mmap=mmap)
        assert_says(error, path)
        assert error.value.path == path


def test_header_length_that_no_memory_holds_is_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(reweft.LimitError, match="max_header_nbytes"):
        reweft.open(path)


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob({"w": row("F7", [1], 0, 1)}, b"a"))
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.open(path)
    assert_says(error, path, "w", "F7")


def test_packed_dtype_is_carried_through(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob({"w": row("F4", [4], 0, 2)}, b"ab"))
    checkpoint = reweft.open(path)
    assert (checkpoint["w"].dtype, checkpoint["w"].nbytes) == ("float4_e2m1fn", 2)
    reweft.convert(path, tmp_path / "y.safetensors")
    assert bytes(reweft.open(tmp_path / "y.safetensors")["w"].read()) == b"ab"


def test_output_must_not_be_the_input(tmp_path: Path) -> None:
    path = save({"w": torch.ones(1)}, tmp_path / "x.pt")
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link", tmp_path / "." / "x.pt"):
        with pytest.raises(reweft.UsageError):
            reweft.convert(path, out)
    assert path.read_bytes() == before


def test_top_level_key_of_a_flat_format(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(reweft.NotFoundError) as error:
        reweft.open(tmp_path / "x.safetensors", top_level_key="state_dict")
    assert_hints(error)
