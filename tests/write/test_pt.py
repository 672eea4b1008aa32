"""Files that `torch.load` reads: torch's own bytes where torch would write the same, and nothing lost elsewhere."""

from __future__ import annotations

import io
import zipfile
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from test_transfer import other_byte_order, rezipped, zoo
from torch import nn
from torch.utils.serialization import config

import reweft
from support import assert_hints, assert_says, leftovers, raw, save, saved_bytes, storage_of, without_crc

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DTYPES = [
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32", "complex64", "complex128",
    "bool", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu",
    "uint16", "uint32", "uint64", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2",
]  # fmt: skip


def of_every_dtype() -> dict[str, torch.Tensor]:
    noise = torch.randint(0, 2, (16 * 6,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {name: noise[: 6 * getattr(torch, name).itemsize].clone().view(getattr(torch, name)) for name in DTYPES}


def views() -> dict[str, torch.Tensor]:
    weight = torch.randn(6, 7)
    return {
        "all": weight, "t": weight.t(), "part": weight[1:, 2:], "row": weight[1], "none": weight[3:3],
        "item": weight[1, 1],
    }  # fmt: skip


def of_sizes(*sizes: int) -> dict[str, torch.Tensor]:
    return {str(size): torch.zeros(size, dtype=torch.uint8) for size in sizes}


def many(count: int) -> dict[str, torch.Tensor]:
    return {f"layer.{number}.weight": torch.full((3,), number) for number in range(count)}


def loads(path: Path) -> list[dict[str, torch.Tensor]]:
    """Every way in which torch reads a file."""
    with config.patch({"load.calculate_storage_offsets": True}):  # type: ignore[attr-defined]
        calculated = torch.load(path, mmap=True)
    return [torch.load(path), torch.load(path, mmap=True), torch.load(path, weights_only=False), calculated]


def assert_holds(path: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    assert zipfile.ZipFile(path).testzip() is None
    for loaded in loads(path):
        assert list(loaded) == list(wanted)
        for key, value in wanted.items():
            found = loaded[key]
            assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride()), key
            assert raw(found) == raw(value), key


ID = b".data/serialization_id"


def without_id(data: bytes) -> bytes:
    """All but the 40 digits that name the content, and their CRC in descriptor and directory."""
    at = data.index(ID) + 64
    at = next(place for place in range(at - 64, at + 200) if data[place : place + 40].isdigit())
    line = data.rindex(ID) - 46 - len("archive/") + 16
    return data[:at] + data[at + 40 : at + 44] + data[at + 48 : line] + data[line + 4 :]


STATES: dict[str, Any] = {
    "empty": dict,
    "one": lambda: {"w": torch.randn(3, 4)},
    "two": lambda: {"w": torch.randn(3, 4), "b": torch.randn(300)},
    "dtypes": of_every_dtype,
    "module": lambda: dict(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2)).state_dict()),
    "dims": lambda: {str(dim): torch.randn([2] * dim) for dim in range(7)},
    "names": lambda: {name: torch.ones(1) for name in ("", "ключ", 'q"\\\n', "a" * 300, "a/../b", "\0")},
    "sizes": lambda: of_sizes(0, 1, 63, 64, 65, 255, 256, 65536, 200_000),
    "views": views,
    "channels_last": lambda: {"w": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)},
    "expanded": lambda: {"w": torch.randn(3, 1).expand(3, 4)},
    **{str(count): partial(many, count) for count in (255, 999, 1000, 1001, 2000, 2001)},
}


@pytest.mark.parametrize("name", STATES)
def test_bytes_are_those_of_torch_save(name: str, tmp_path: Path) -> None:
    state = STATES[name]()
    path = save(state, tmp_path / "x.pt")
    report = reweft.convert(path, tmp_path / "y.pt")
    ours, theirs = (tmp_path / "y.pt").read_bytes(), saved_bytes(state)
    assert without_id(ours) == without_id(theirs)
    assert len(ours) == len(theirs)
    assert report.notices == ()
    assert_holds(tmp_path / "y.pt", state)


@pytest.mark.parametrize("name", ["dtypes", "views", "module"])
def test_conversion_of_our_own_file_is_byte_identical(name: str, tmp_path: Path) -> None:
    reweft.convert(save(STATES[name](), tmp_path / "x.pt"), tmp_path / "1.pt")
    reweft.convert(tmp_path / "1.pt", tmp_path / "2.pth")
    assert (tmp_path / "1.pt").read_bytes() == (tmp_path / "2.pth").read_bytes()


@pytest.mark.parametrize("container", ["plain", "no_crc", "deflated", "big", "old", "mapped"])
def test_every_layout_and_size_arrives_from_every_container(container: str, tmp_path: Path) -> None:
    state, path = zoo(), tmp_path / "x.pt"
    if container == "big":
        state = {key: value for key, value in state.items() if value.element_size() > 1}
    if container == "no_crc":
        without_crc(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container != "old")
    if container == "deflated":
        rezipped(path)
    if container == "big":
        other_byte_order(path)
    reweft.convert(reweft.open(path, mmap=container == "mapped"), tmp_path / "y.pt")
    assert_holds(tmp_path / "y.pt", torch.load(path))


def test_from_safetensors(tmp_path: Path) -> None:
    state = {key: value.contiguous().clone() for key, value in zoo().items()}
    save_file(state, tmp_path / "x.safetensors", {"license": "MIT"})
    report = reweft.convert(tmp_path / "x.safetensors", tmp_path / "y.bin")
    assert_holds(tmp_path / "y.bin", {key: state[key] for key in reweft.open(tmp_path / "x.safetensors")})
    assert report.not_carried == ("__metadata__.license",)


class TestSharing:
    def test_storages_stay_shared(self, tmp_path: Path) -> None:
        weight = torch.randn(40, 6)
        state = {"a": weight, "tied": weight, "view": weight.t(), "part": weight[3:5, 1:], "other": weight.clone()}
        report = reweft.convert(save(state, tmp_path / "x.pt"), tmp_path / "y.pt")
        assert report.dropped_aliases == {}
        for loaded in loads(tmp_path / "y.pt"):
            assert len({storage_of(loaded[key]) for key in ("a", "tied", "view", "part")}) == 1
            assert storage_of(loaded["other"]) != storage_of(loaded["a"])
            assert loaded["part"].storage_offset() == 19
            loaded["a"][3, 1] = 77
            assert loaded["view"][1, 3] == 77
            assert loaded["part"][0, 0] == 77

    @pytest.mark.parametrize("shared", ["error", "duplicate", "drop-aliases"])
    def test_the_choice_for_other_formats_changes_nothing(self, shared: Any, tmp_path: Path) -> None:
        weight = torch.randn(3)
        reweft.convert(save({"a": weight, "b": weight}, tmp_path / "x.pt"), tmp_path / "y.pt", shared=shared)
        loaded = torch.load(tmp_path / "y.pt")
        assert storage_of(loaded["a"]) == storage_of(loaded["b"])

    def test_a_slice_takes_what_it_shows_and_the_report_says_so(self, tmp_path: Path) -> None:
        base = torch.randn(1000, 1000)
        path = save({"a": base[10:12, 5:], "b": base[13, :7], "whole": torch.ones(3)}, tmp_path / "x.pt")
        report = reweft.convert(path, tmp_path / "y.pt")
        assert (tmp_path / "y.pt").stat().st_size < 20_000
        left_out = base.nbytes - (13_007 - 10_005) * 4
        assert [notice for notice in report.notices if f"{left_out} bytes" in notice and "of a" in notice]
        for loaded in loads(tmp_path / "y.pt"):
            assert torch.equal(loaded["a"], base[10:12, 5:])
            assert torch.equal(loaded["b"], base[13, :7])
            assert loaded["a"].stride() == (1000, 1)
            assert storage_of(loaded["a"]) == storage_of(loaded["b"])
            assert loaded["b"].storage_offset() - loaded["a"].storage_offset() == 2995

    def test_a_slice_of_bytes_that_are_typed_by_their_tensors(self, tmp_path: Path) -> None:
        base = torch.arange(100, dtype=torch.int16).view(torch.uint16)
        state = {"a": base[7:20], "b": base[9:30]}
        reweft.convert(save(state, tmp_path / "x.pt"), tmp_path / "y.pt")
        assert_holds(tmp_path / "y.pt", state)
        loaded = torch.load(tmp_path / "y.pt")
        assert loaded["a"].untyped_storage().nbytes() == 46


def test_tensors_that_are_made_when_they_are_read(tmp_path: Path) -> None:
    weight = torch.randn(1 << 19)
    rules: list[dict[str, Any]] = [
        {"match": "^(a|tied)$", "cast": "bfloat16"},
        {"concat": ["^p$", "^q$"], "into": "pq"},
    ]
    path = save({"a": weight, "tied": weight, "p": weight[:4], "q": torch.ones(3)}, tmp_path / "x.pt")
    reweft.convert(path, tmp_path / "y.pt", keys=reweft.KeyMap(rules))
    half = weight.bfloat16()
    assert_holds(tmp_path / "y.pt", {"a": half, "tied": half, "pq": torch.cat([weight[:4], torch.ones(3)])})
    loaded = torch.load(tmp_path / "y.pt")
    assert storage_of(loaded["a"]) == storage_of(loaded["tied"])


def test_dtype_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    header = (
        b'{"ok":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F4","shape":[2],"data_offsets":[1,2]}}'
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.convert(path, tmp_path / "y.pt")
    assert_says(error, path, '"w"', "float4_e2m1fn")
    assert_hints(error)
    assert not (tmp_path / "y.pt").exists()
    assert leftovers(tmp_path) == []


def test_what_was_on_another_device_loads_on_the_cpu_and_the_report_says_so(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"))
    report = reweft.convert(path, tmp_path / "y.pt")
    assert any("cuda:0" in notice for notice in report.notices)
    assert torch.equal(torch.load(tmp_path / "y.pt")["w"], torch.ones(2))


def test_bytes_do_not_depend_on_the_name(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt")
    for name in ("a.pt", "b.c.pth", "ключ.bin"):
        reweft.convert(path, tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in ("a.pt", "b.c.pth", "ключ.bin")}) == 1
    reweft.convert(save({"w": torch.zeros(2)}, tmp_path / "x.pt"), tmp_path / "z.pt")
    ids = [zipfile.ZipFile(tmp_path / name).read("archive/.data/serialization_id") for name in ("a.pt", "z.pt")]
    assert len(set(ids)) == 2, "another content has another name"
    assert all(len(digits) == 40 and digits.isdigit() for digits in ids)


def test_old_torch_needs_nothing_new(tmp_path: Path) -> None:
    """The pickle names what torch 1.6 had already, and protocol 2."""
    reweft.convert(save({"w": torch.ones(2), "n": torch.ones(2).long()}, tmp_path / "x.pt"), tmp_path / "y.pt")
    pickle = zipfile.ZipFile(tmp_path / "y.pt").read("archive/data.pkl")
    assert pickle.startswith(b"\x80\x02")
    assert b"_rebuild_tensor_v3" not in pickle
    with io.BytesIO((tmp_path / "y.pt").read_bytes()) as buffer:
        assert torch.equal(torch.load(buffer)["w"], torch.ones(2))
