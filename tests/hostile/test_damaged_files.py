"""Files from strangers: nothing in them runs, and damage is an error or changes nothing."""

from __future__ import annotations

import io
import os
import pickle
import random
import stat
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import reweft
import reweft.torch as rt
from support import assert_hints, assert_says, flip, record_at, save

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Package


def contents(path: Path, *, mmap: bool = False) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...], bytes]]:
    """All that a checkpoint says of its tensors."""
    checkpoint = reweft.open(path, mmap=mmap)
    return {key: (info.dtype, info.shape, info.strides, bytes(info.read())) for key, info in checkpoint.items()}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    state = {"fc.weight": torch.randn(2, 3).t(), "fc.bias": torch.randn(3), "step": 7}
    return save(state, tmp_path / "x.pt")


def test_no_truncated_file_is_read(small: Path) -> None:
    data = small.read_bytes()
    for nbytes in range(len(data)):
        small.write_bytes(data[:nbytes])
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)):
            contents(small, mmap=nbytes % 2 == 0)


def test_bytes_before_or_behind_the_archive_are_refused(small: Path) -> None:
    data = small.read_bytes()
    for content in (data + b"x", b"x" + data, data + data, b"PK\x03\x04" + data):
        small.write_bytes(content)
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)):
            reweft.open(small)


def test_no_flipped_bit_changes_what_is_read(small: Path) -> None:
    """Every byte is a record's (CRC), stated twice (headers), or means nothing (times, versions)."""
    data, wanted = small.read_bytes(), contents(small)
    refused = 0
    for at in range(len(data)):
        for bit in (0, 6):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            small.write_bytes(changed)
            try:
                found = contents(small, mmap=bit == 0)
            except reweft.ReweftError:
                refused += 1
            else:
                assert found == wanted, f"bit {bit} of byte {at:#x}"
    assert refused > len(data) // 2


def test_random_bytes_over_an_archive_never_end_in_a_panic(small: Path) -> None:
    data, dice = small.read_bytes(), random.Random(0)  # noqa: S311
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(dice.randrange(1, 6)):
            at = dice.randrange(len(data))
            changed[at : at + 4] = dice.choice([b"\xff" * 4, bytes(4), dice.randbytes(4)])[: len(data) - at]
        small.write_bytes(changed)
        try:
            contents(small)
        except (reweft.FormatError, reweft.UnsupportedError, reweft.LimitError):
            continue


class Runs:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    folder = tmp_path / "made by the pickle"
    path = save({"w": torch.ones(2), "evil": Runs(folder)}, tmp_path / "x.pt")
    checkpoint = reweft.open(path)
    assert list(checkpoint) == ["w"]
    assert any("mkdir" in name for name in checkpoint.unknown_globals)
    assert "evil" in checkpoint.non_tensors
    reweft.convert(path, tmp_path / "x.safetensors")
    assert not folder.exists()
    torch.load(path, weights_only=False)
    assert folder.exists()  # the file is what it is said to be


def test_tensor_beside_a_call_is_not_taken_for_the_calls_result(tmp_path: Path) -> None:
    class Wraps:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.neg, (torch.ones(2),)

    checkpoint = reweft.open(save({"w": Wraps()}, tmp_path / "x.pt"))
    assert list(checkpoint.unreadable) == ["w"]


def rezip(path: Path, method: int, change: Callable[[str, bytes], bytes] = lambda _name, data: data) -> None:
    """Write the archive again with Python's zipfile."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records:
            archive.writestr(name, change(name, data))


def test_deflated_archive_is_read(small: Path) -> None:
    wanted = contents(small)
    rezip(small, zipfile.ZIP_DEFLATED)
    assert contents(small, mmap=True) == contents(small) == wanted


def test_other_compression_is_refused_with_a_hint(small: Path) -> None:
    rezip(small, zipfile.ZIP_BZIP2)
    with pytest.raises(reweft.UnsupportedError, match="compressed") as error:
        contents(small, mmap=True)
    assert_hints(error)


def test_archive_stored_again_is_read(small: Path) -> None:
    wanted = contents(small)
    rezip(small, zipfile.ZIP_STORED)
    assert contents(small, mmap=True) == contents(small) == wanted


def test_duplicate_record_is_refused(small: Path) -> None:
    with zipfile.ZipFile(small, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data/0", b"other")
    with pytest.raises(reweft.FormatError):
        reweft.open(small)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "x/../../y", "y/data/0"])
def test_record_outside_the_root_is_refused(name: str, small: Path) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.writestr(name, b"data")
    with pytest.raises(reweft.FormatError):
        reweft.open(small)


def test_record_shorter_than_its_tensor(small: Path) -> None:
    rezip(small, zipfile.ZIP_STORED, lambda name, data: data[:-4] if name.endswith("data/1") else data)
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(small)
    assert_says(error, small, "fc.bias", "8 bytes", "12")


def test_absent_record(small: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(small, "w") as archive:
        for name, data in records:
            if not name.endswith("data/1"):
                archive.writestr(name, data)
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(small)
    assert_says(error, small, "fc.bias", "data/1")


def with_pickle(path: Path, data: bytes) -> Path:
    rezip(path, zipfile.ZIP_STORED, lambda name, old: data if name.endswith("data.pkl") else old)
    return path


@pytest.mark.parametrize(
    "data",
    [b"", b".", b"\x80\x02}", b"\x80\x02}.x", b"\x80\x02h\x00.", b"\xff", b"\x80\x02(" * 3, b"\x80\x02]q\x00h\x01."],
)
def test_broken_pickle(data: bytes, small: Path) -> None:
    with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
        reweft.open(with_pickle(small, data))
    assert_says(error, small, "data.pkl")


def test_deep_nesting_ends(small: Path) -> None:
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    try:
        assert len(reweft.open(with_pickle(small, deep))) == 0
    except reweft.ReweftError as error:
        assert str(small) in str(error)  # noqa: PT017


def test_containers_that_multiply_end(small: Path) -> None:
    """Ten lists of ten times the list before: ten thousand million leaves in a few hundred bytes."""
    value: list[Any] = [torch.Size([1])]
    for _ in range(10):
        value = [value] * 10
    with pytest.raises(reweft.LimitError):
        reweft.open(with_pickle(small, pickle.dumps(value, 2)))


def test_window_behind_its_storage(small: Path) -> None:
    with zipfile.ZipFile(small) as archive:
        data = archive.read("x/data.pkl")
    # The sizes of fc.weight, (3, 2), become (3, 200).
    assert data.count(b"K\x03K\x02\x86") == 1
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(with_pickle(small, data.replace(b"K\x03K\x02\x86", b"K\x03K\xc8\x86")))
    assert_says(error, small, "fc.weight", "24")


def test_expanded_tensor_of_huge_size_is_a_limit_not_an_allocation(small: Path) -> None:
    path = save({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, small)
    info = reweft.open(path)["w"]
    assert info.nbytes == 1 << 42
    with pytest.raises(reweft.LimitError, match="max_repeated_nbytes"):
        info.read()
    assert reweft.open(path, mmap=True)["w"].numpy()[1000, 1000] == 1


def zipped(records: dict[str, bytes]) -> bytes:
    """A zip archive that torch did not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


FOREIGN: dict[str, Callable[[Path], object]] = {
    "plain_zip": lambda path: path.write_bytes(zipped({"folder/readme": b"text"})),
    "numpy": lambda path: path.write_bytes(np.lib.format.MAGIC_PREFIX + bytes(80)),
    "npz": lambda path: path.write_bytes(zipped({"arr_0.npy": bytes(80)})),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    FOREIGN[kind](path)
    with pytest.raises((reweft.UnsupportedError, reweft.FormatError)) as error:
        reweft.open(path)
    assert_says(error, path)


def test_skipped_data_is_not_read_as_zeros_without_a_word(tmp_path: Path) -> None:
    """`torch.serialization.skip_data` writes holes for another program to fill."""
    with torch.serialization.skip_data():
        path = save({"w": torch.ones(100)}, tmp_path / "x.pt")
    try:
        checkpoint = reweft.open(path)
    except reweft.ReweftError:
        return
    assert checkpoint.notices


@pytest.mark.parametrize("path", ["", "absent", "."])
def test_path_that_cannot_be_opened(path: str, tmp_path: Path) -> None:
    calls: list[Callable[[Path], object]] = [reweft.open, rt.load, lambda where: reweft.plan(where, where)]
    for call in calls:
        with pytest.raises(reweft.ReweftError) as error:
            call(tmp_path / path)
        assert_says(error, tmp_path / path)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full"])
def test_device_is_refused_and_not_read(device: str, tmp_path: Path) -> None:
    index, shard = tmp_path / "x.index.json", tmp_path / "one.safetensors"
    index.write_text('{"weight_map": {"w": "one.safetensors"}}')
    shard.symlink_to(device)
    for call in (reweft.open, lambda path: reweft.plan(path, path)):
        for path in (device, shard):
            with pytest.raises(reweft.ReweftError, match="not a regular file") as error:
                call(path)
            assert_says(error, path)
    with pytest.raises(reweft.UnsupportedError, match="leaves the folder"):
        reweft.open(index)
    shard.unlink()
    try:
        os.mknod(shard, 0o600 | stat.S_IFCHR, Path(device).stat().st_rdev)
    except PermissionError:  # only root makes devices
        return
    with pytest.raises(reweft.ReweftError, match="not a regular file"):
        reweft.open(index)


class TestPackages:
    """A package is a program; what of it is data is checked like a checkpoint."""

    @pytest.fixture
    def own(self, digits: Package, tmp_path: Path) -> Path:
        path = tmp_path / "own.pt2"
        path.write_bytes(digits.path.read_bytes())
        return path

    @pytest.mark.parametrize("end", [".wrapper.so", "reweft_manifest.json", ".wrapper.cpp", "weights.blob"])
    def test_flipped_bit_is_found_at_load(self, end: str, own: Path) -> None:
        start, nbytes = record_at(own, end)
        flip(own, start + nbytes // 2)
        with pytest.raises(reweft.FormatError) as error:
            rt.load(own)
        assert_says(error, own, end, "CRC")

    def test_truncated_package(self, own: Path, digits_b: Path) -> None:
        data = own.read_bytes()
        for part in (0.1, 0.5, 0.9, 0.999):
            own.write_bytes(data[: int(len(data) * part)])
            for call in (rt.load, lambda path: reweft.refit(path, digits_b, out=path)):
                with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
                    call(own)
                assert_says(error, own)
            assert own.read_bytes() == data[: int(len(data) * part)]

    def test_refit_of_a_package_with_one_flipped_bit_fails_or_copies_the_bit(
        self, own: Path, digits_b: Path, tmp_path: Path
    ) -> None:
        data, out = own.read_bytes(), tmp_path / "out.pt2"
        reweft.refit(own, digits_b, out=out)
        wanted, dice = out.read_bytes(), random.Random(1)  # noqa: S311
        start, nbytes = record_at(own, "weights.blob")
        places = [start + dice.randrange(nbytes) for _ in range(20)]
        places += [len(data) - dice.randrange(4000) - 1 for _ in range(150)]
        places += [dice.randrange(len(data)) for _ in range(50)]
        for at in places:
            changed = bytearray(data)
            changed[at] ^= 0x10
            own.write_bytes(changed)
            try:
                reweft.refit(own, digits_b, out=out)
            except reweft.ReweftError:
                continue
            copied = bytearray(wanted)
            copied[at] ^= 0x10
            assert out.read_bytes() == copied, f"byte {at:#x}"
