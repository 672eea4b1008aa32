"""What is said of files that cannot be read: what they are, and how much of them is missing."""

from __future__ import annotations

import gzip
import io
import re
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors
from torch import nn

import reweft
from support import assert_says, save, saved_bytes

if TYPE_CHECKING:
    from pathlib import Path


class TestTruncatedArchives:
    def test_missing_bytes_are_counted(self, tmp_path: Path) -> None:
        state = {f"layer.{number}": torch.randn(1000) for number in range(20)}
        state["tied"] = state["layer.0"]
        whole = save(state, tmp_path / "x.pt").read_bytes()
        pickle_end = whole.index(b"\x50\x4b\x07\x08")
        for length in range(pickle_end + 1, 80_000, 997):
            (tmp_path / "cut.pt").write_bytes(whole[:length])
            with pytest.raises(reweft.FormatError) as error:
                reweft.open(tmp_path / "cut.pt")
            found = re.search(r"truncated: it has (\d+) bytes.*at least (\d+) are missing", str(error.value))
            assert found, str(error.value)
            assert int(found[1]) == length
            missing = len(whole) - length
            # The padding between records is not counted.
            assert missing - 64 * 30 - 4000 < int(found[2]) <= missing

    def test_cut_within_the_pickle(self, tmp_path: Path) -> None:
        whole = save({"a": torch.ones(3)}, tmp_path / "x.pt").read_bytes()
        (tmp_path / "cut.pt").write_bytes(whole[:150])
        with pytest.raises(reweft.FormatError) as error:
            reweft.open(tmp_path / "cut.pt")
        assert_says(error, "truncated within its first record, after 150 bytes", "data.pkl")

    def test_large_pickle(self, tmp_path: Path) -> None:
        """The pickle takes more than the first piece that is read."""
        state = {f"{'long.' * 20}{number}": torch.zeros(2) for number in range(3000)}
        whole = save(state, tmp_path / "x.pt").read_bytes()
        for part, what in ((0.3, "first record"), (0.7, "are missing")):
            (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * part)])
            with pytest.raises(reweft.FormatError, match=what):
                reweft.open(tmp_path / "cut.pt")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_other_archives_are_said_to_be_cut(self, tmp_path: Path) -> None:
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))  # type: ignore[no-untyped-call]
        whole = (tmp_path / "x.pt").read_bytes()
        (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(reweft.FormatError, match="end record") as error:
            reweft.open(tmp_path / "cut.pt")
        assert "truncated" in str(error.value)

    def test_bytes_behind_are_counted_and_not_taken_for_a_cut(self, tmp_path: Path) -> None:
        path = save({"a": torch.ones(3)}, tmp_path / "x.pt")
        path.write_bytes(path.read_bytes() + b"12345")
        with pytest.raises(reweft.FormatError, match="5 bytes stand behind the archive") as error:
            reweft.open(path)
        assert "truncated" not in str(error.value)


class TestVersions:
    def rewritten(self, path: Path, **records: bytes | None) -> Path:
        """The archive with its version records replaced."""
        with zipfile.ZipFile(path) as archive:
            kept = {info.filename: archive.read(info) for info in archive.infolist()}
        root = next(iter(kept)).partition("/")[0]
        for name, content in records.items():
            record = f"{root}/{name.replace('__', '.data/')}"
            kept.pop(record, None)
            if content is not None:
                kept[record] = content
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in kept.items():
                archive.writestr(name, content)
        return path

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save({"a": torch.ones(3)}, tmp_path / "x.pt")

    @pytest.mark.parametrize("version", range(1, 11))
    def test_known_versions_are_read(self, version: int, path: Path) -> None:
        self.rewritten(path, version=f"{version}\n".encode())
        assert torch.load(path)["a"].tolist() == [1, 1, 1]
        assert reweft.open(path)["a"].numpy().tolist() == [1, 1, 1]

    def test_version_in_the_other_record(self, path: Path) -> None:
        self.rewritten(path, version=None, __version=b"6\n")
        assert torch.load(path)["a"].tolist() == [1, 1, 1]
        assert reweft.open(path)["a"].numpy().tolist() == [1, 1, 1]

    @pytest.mark.parametrize("version", [b"0\n", b"11\n", b"4294967296"])
    def test_other_versions_are_named(self, version: bytes, path: Path) -> None:
        self.rewritten(path, version=version)
        with pytest.raises(reweft.UnsupportedError) as error:
            reweft.open(path)
        assert_says(error, path, "version", version.strip().decode(), "1 to 10")

    @pytest.mark.parametrize("version", [b"", b"three", b"-3", b"3.0", b"3" * 1000, b"\xff"])
    def test_version_that_is_no_number(self, version: bytes, path: Path) -> None:
        self.rewritten(path, version=version)
        with pytest.raises(reweft.FormatError, match="version"):
            reweft.open(path)

    def test_no_version(self, path: Path) -> None:
        self.rewritten(path, version=None)
        with pytest.raises(RuntimeError):
            torch.load(path)
        with pytest.raises(reweft.FormatError, match="no version"):
            reweft.open(path)

    def test_two_versions(self, path: Path) -> None:
        self.rewritten(path, __version=b"6\n")
        with pytest.raises(reweft.FormatError, match="two versions"):
            reweft.open(path)

    def test_layout_of_torch_1_0_to_1_5(self, path: Path) -> None:
        """No byte order, no alignment, `version` first."""
        with zipfile.ZipFile(path) as archive:
            kept = {info.filename: archive.read(info) for info in archive.infolist()}
        wanted = ["x/version", "x/data.pkl", "x/data/0"]
        with zipfile.ZipFile(path, "w") as archive:
            for name in wanted:
                archive.writestr(name, b"1\n" if name == "x/version" else kept[name])
        assert torch.load(path)["a"].tolist() == [1, 1, 1]
        assert reweft.open(path)["a"].numpy().tolist() == [1, 1, 1]


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


def inside(name: str) -> bytes:
    """A checkpoint in an archive that somebody packed it into."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, saved_bytes({"a": torch.ones(3)}))
    return buffer.getvalue()


FILES = {
    "checkpoint_in_a_zip": (inside("model.pt"), "do not lie in a folder"),
    "checkpoint_in_a_folder_of_a_zip": (inside("x/model.pt"), "torch did not write it"),
    "checkpoint_in_gzip": (gzip.compress(saved_bytes({"a": torch.ones(3)})), "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "7z"),
    "gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "page": (b"<!DOCTYPE html><title>404</title>", "HTML"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "npz": (npz(), "npz"),
    "npy": (npy(), "npy"),
    "xz": (b"\xfd7zXZ\0\0\x04", "xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", "zstd"),
    "bzip2": (b"BZh91AY&SY", "bzip2"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
    "flatbuffer": (b"\x1c\0\0\0PTMF\0\0\0\0", "flatbuffer"),
    "preview": (b"PYTORCH1\0\0\0\0", "preview of torch 1.0"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:", "ONNX"),
    "json_list": (b"[1, 2, 3]", "JSON"),
    "json": (b'{"model_type": "bert"}', "weight_map"),
    "zeros": (bytes(10_000), "zeros"),
    "text": (b"epoch,loss\n1,0.5\n", "no checkpoint"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_is_named_by_what_it_is(name: str, tmp_path: Path) -> None:
    content, what = FILES[name]
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises((reweft.UnsupportedError, reweft.FormatError)) as error:
        reweft.open(tmp_path / "x.pt")
    assert_says(error, tmp_path / "x.pt", what)


def test_safetensors_by_another_name_is_read(tmp_path: Path) -> None:
    """The content decides; the name says what somebody wished."""
    (tmp_path / "x.pt").write_bytes(safetensors({"a": torch.ones(3)}))
    checkpoint = reweft.open(tmp_path / "x.pt")
    assert (checkpoint.format, checkpoint["a"].numpy().tolist()) == ("safetensors", [1, 1, 1])


@pytest.mark.filterwarnings("ignore")
def test_flatbuffer_of_this_torch(tmp_path: Path) -> None:
    program: Any = torch.jit.script(nn.Linear(2, 2))
    try:
        program._save_for_lite_interpreter(str(tmp_path / "x.ptl"), _use_flatbuffer=True)
    except RuntimeError:  # this build has no flatbuffers
        (tmp_path / "x.ptl").write_bytes(FILES["flatbuffer"][0])
    with pytest.raises(reweft.UnsupportedError, match="flatbuffer"):
        reweft.open(tmp_path / "x.ptl")
