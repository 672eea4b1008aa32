"""The tar format of 2016: parity with `torch.load`, which still reads it, and files that contradict themselves."""

from __future__ import annotations

import struct
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import old_torch
import reweft
from support import assert_hints, assert_says, raw

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def written(value: object, folder: Path) -> Path:
    (folder / "x.pt").write_bytes(old_torch.tar(value))
    return folder / "x.pt"


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def assert_equal(checkpoint: reweft.Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert (checkpoint.format, checkpoint.unreadable) == ("torch tar", {})
    assert list(checkpoint) == list(wanted)
    for key, value in wanted.items():
        info = checkpoint[key]
        assert (info.dtype, info.shape) == (str(value.dtype).removeprefix("torch."), tuple(value.shape)), key
        assert (info.strides, info.storage_offset) == (value.stride(), value.storage_offset()), key
        assert bytes(info.read()) == raw(value), key


def test_dtypes_layouts_and_sharing(tmp_path: Path) -> None:
    base = torch.arange(24).reshape(4, 6)
    state = {str(dtype): base.to(dtype) for dtype in old_torch.NAMES}
    state |= {"t": base.t(), "slice": base[1:3, 2:], "expanded": base[:1].expand(3, 6), "empty": base[:0]}
    path = written({"net": state, "epoch": 3}, tmp_path)
    theirs = loaded(path)["net"]
    for mmap in (False, True):
        checkpoint = reweft.open(path, mmap=mmap, top_level_key="net")
        assert_equal(checkpoint, theirs)
        assert checkpoint["t"].storage == checkpoint["slice"].storage != checkpoint["torch.float32"].storage
    assert reweft.open(path).non_tensors == {"epoch": "int 3"}


def test_tensor_under_two_keys(tmp_path: Path) -> None:
    weight = torch.randn(2, 3)
    checkpoint = reweft.open(written({"a": weight, "b": weight}, tmp_path))
    assert_equal(checkpoint, {"a": weight, "b": weight})
    assert checkpoint["a"].storage == checkpoint["b"].storage


def test_whole_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    path = written(module, tmp_path)
    assert_equal(reweft.open(path), loaded(path).state_dict())


def members(value: object) -> dict[str, bytes]:
    """The members of a file, to be changed and put together again."""
    data = old_torch.tar(value)
    found = {}
    at = 0
    while data[at]:
        name = data[at : at + 100].rstrip(b"\0").decode()
        nbytes = int(data[at + 124 : at + 135], 8)
        found[name] = data[at + 512 : at + 512 + nbytes]
        at += 512 + -(-nbytes // 512) * 512
    return found


def made(
    folder: Path,
    *,
    storages: bytes | None = None,
    views: list[tuple[int, ...]] | None = None,
    tensors: bytes | None = None,
    pickled: bytes | None = None,
) -> Path:
    """A file of one storage 7 of four floats 0 to 3 and one tensor 9 that is all of it, but for what is given."""
    row = old_torch.storage_row(7, "Float", struct.pack("<4f", 0, 1, 2, 3), 4)
    parts = {
        "storages": old_torch.dumped(1) + (row if storages is None else storages) + old_torch.dumped(views or []),
        "tensors": old_torch.dumped(1) + (tensors or old_torch.tensor_row(9, 7, "Float", ((4,), (1,), 0))),
        "pickle": pickled or b"\x80\x02}X\x01\0\0\0aK\x09Qs.",
    }
    (folder / "x.pt").write_bytes(old_torch.archive(parts))
    return folder / "x.pt"


def test_views_of_storages(tmp_path: Path) -> None:
    row = old_torch.tensor_row(9, 8, "Float", ((2,), (1,), 1))
    path = made(tmp_path, views=[(5, 7, 1, 3), (8, 5, 0, 3)], tensors=row)
    theirs = loaded(path)["a"]
    assert theirs.tolist() == [2, 3]
    info = reweft.open(path)["a"]
    assert bytes(info.read()) == raw(theirs)
    assert info.storage_offset == 2


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_storage_without_a_tensor(tmp_path: Path) -> None:
    path = made(tmp_path, pickled=b"\x80\x02}X\x01\0\0\0aK\x07Qs.")
    assert loaded(path)["a"].tolist() == [0, 1, 2, 3]
    checkpoint = reweft.open(path)
    assert checkpoint["a"].numpy().tolist() == [0, 1, 2, 3]
    assert any("no tensor is around" in notice for notice in checkpoint.notices)


def test_empty_tensor_of_2016_is_unreadable_not_uninitialised(tmp_path: Path) -> None:
    """torch 2.15 reads such a row as a number without memory behind it."""
    tensors = old_torch.tensor_row(9, 7, "Float", ((), (), 0))
    path = made(tmp_path, storages=old_torch.storage_row(7, "Float", b"", 0), tensors=tensors)
    assert "empty tensor" in reweft.open(path).unreadable["a"]


def float_row(shape: tuple[int, ...], strides: tuple[int, ...], storage_offset: int) -> bytes:
    return old_torch.tensor_row(9, 7, "Float", (shape, strides, storage_offset))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "tensor_larger_than_storage": ({"tensors": float_row((5,), (1,), 0)}, "storage has 16"),
    "offset_behind_storage": ({"tensors": float_row((1,), (1,), 4)}, "storage has 16"),
    "strides_overflow": ({"tensors": float_row((4,), (2**62,), 0)}, "overflows"),
    "negative_size": ({"tensors": float_row((-1,), (1,), 0)}, "size is -1"),
    "negative_stride": ({"tensors": float_row((4,), (-1,), 0)}, "stride is -1"),
    "negative_offset": ({"tensors": float_row((4,), (1,), -1)}, "storage offset is -1"),
    "negative_dims": ({"tensors": old_torch.dumped((9, 7, torch.FloatTensor)) + struct.pack("<i4x", -1)}, "dimensions"),
    "huge_dims": ({"tensors": old_torch.dumped((9, 7, torch.FloatTensor)) + struct.pack("<i4x", 2**31 - 1)}, "dimens"),
    "no_such_storage": ({"tensors": old_torch.tensor_row(9, 6, "Float", ((4,), (1,), 0))}, "no storage 6"),
    "other_type": ({"tensors": old_torch.tensor_row(9, 7, "Double", ((2,), (1,), 0))}, "another type"),
    "number_given_twice": ({"tensors": old_torch.tensor_row(7, 7, "Float", ((4,), (1,), 0))}, "two objects"),
    "bytes_behind_tensors": ({"tensors": float_row((4,), (1,), 0) + b"x"}, "1 bytes stand behind"),
    "no_such_tensor": ({"pickled": b"\x80\x02}X\x01\0\0\0aK\x0bQs."}, "no storage or tensor 11"),
    "id_is_no_number": ({"pickled": b"\x80\x02}X\x01\0\0\0aNQs."}, "wanted a number"),
    "bytes_behind_pickle": ({"pickled": b"\x80\x02}.x"}, "1 bytes stand behind"),
    "storage_behind_file": ({"storages": old_torch.storage_row(7, "Float", b"", 2**40)}, "too early"),
    "storage_overflows": ({"storages": old_torch.storage_row(7, "Float", b"", 2**62)}, "2^64"),
    "negative_storage": ({"storages": old_torch.storage_row(7, "Float", b"", -1)}, "storage size is -1"),
    "view_of_nothing": ({"views": [(8, 6, 0, 1)]}, "no storage 6"),
    "view_too_large": ({"views": [(8, 7, 1, 4)]}, "larger than its storage"),
    "view_negative": ({"views": [(8, 7, -1, 4)]}, "larger than its storage"),
    "view_overflows": ({"views": [(8, 7, 2**62, 2**62)]}, "larger than its storage"),
    "view_of_a_view_too_large": ({"views": [(8, 7, 1, 2), (6, 8, 1, 2)]}, "view 6"),
    "view_is_no_row": ({"views": [(8, 7)]}, "tuples of 4"),
    "tensor_leaves_its_view": (
        {"views": [(8, 7, 0, 2)], "tensors": old_torch.tensor_row(9, 8, "Float", ((3,), (1,), 0))},
        "storage has 8",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradiction(name: str, tmp_path: Path) -> None:
    parts, what = CONTRADICTIONS[name]
    path = made(tmp_path, **parts)
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, what)


def test_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    data = old_torch.tar({"a": torch.randn(4)})
    used = len(data.rstrip(b"\0"))
    for length in [*range(0, used, 7), used, used + 511]:
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)):
            reweft.open(tmp_path / "cut.pt")


KINDS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "symlink": lambda parts: old_torch.member("storages", b"", tarfile.SYMTYPE) + old_torch.archive(parts),
    "hard_link": lambda parts: old_torch.member("storages", b"", tarfile.LNKTYPE) + old_torch.archive(parts),
    "device": lambda parts: old_torch.member("storages", b"", tarfile.CHRTYPE) + old_torch.archive(parts),
    "fifo": lambda parts: old_torch.member("storages", b"", tarfile.FIFOTYPE) + old_torch.archive(parts),
    "folder": lambda parts: old_torch.member("storages", b"", tarfile.DIRTYPE) + old_torch.archive(parts),
    "sparse": lambda parts: old_torch.member("storages", b"", tarfile.GNUTYPE_SPARSE) + old_torch.archive(parts),
    "pax": lambda parts: old_torch.member("x", b"11 size=17\n", tarfile.XHDTYPE) + old_torch.archive(parts),
    "long_name": lambda parts: old_torch.member("x", b"pickle\0", tarfile.GNUTYPE_LONGNAME) + old_torch.archive(parts),
    "absolute": lambda parts: old_torch.archive({"/etc/passwd": b"", **parts}),
    "parent": lambda parts: old_torch.archive({"../x": b"", **parts}),
    "twice": lambda parts: old_torch.member("pickle", b"") + old_torch.archive(parts),
    "without_tensors": lambda parts: old_torch.archive({name: parts[name] for name in ("storages", "pickle")}),
    "not_torchs": lambda _parts: old_torch.archive({"readme": b"hello"}),
    "followed": lambda parts: old_torch.archive(parts) + b"x",
}


@pytest.mark.parametrize("kind", KINDS)
def test_archive_that_torch_did_not_write(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(KINDS[kind](members({"a": torch.ones(2)})))
    with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
        reweft.open(path)
    assert_says(error, path)
    assert [child.name for child in tmp_path.iterdir()] == ["x.pt"]


def test_foreign_tar_is_named_with_its_members(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(old_torch.archive({"model.pt": b"hello", "config.yaml": b""}))
    with pytest.raises(reweft.UnsupportedError, match="torch did not write it") as error:
        reweft.open(path)
    assert_says(error, "model.pt", "config.yaml")
    assert_hints(error)


def test_other_members_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(old_torch.archive({**members({"a": torch.ones(2)}), "note": b"text"}))
    assert any("'note'" in notice or '"note"' in notice for notice in reweft.open(path).notices)
