"""Packages that contradict themselves: compiled ones, around a library that is none, and exported programs."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest

import reweft
import reweft.torch as rt
from opcodes import archive, pairs, tensor, text, whole, zipped
from support import assert_hints, assert_says, leftovers

FIXTURES = Path(__file__).parents[2] / "fixtures"
WEIGHTS = FIXTURES / "checkpoints/fc.pt"
SOURCE, BLOB, LIBRARY = (f"net/data/aotinductor/model/abc.wrapper{end}" for end in (".cpp", "_weights.blob", ".so"))


def records(name: str = "packages/plain.pt2") -> dict[str, bytes]:
    with zipfile.ZipFile(FIXTURES / name) as held:
        return {record: held.read(record) for record in held.namelist()}


def written(path: Path, changed: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> Path:
    """The package with other records; None takes one out."""
    kept = {name: content for name, content in (records() | changed).items() if content is not None}
    path.write_bytes(zipped(kept, method))
    return path


def stated(old: bytes, new: bytes) -> dict[str, bytes | None]:
    """The source with another statement about the first row that has this one."""
    source = records()[SOURCE]
    assert old in source
    return {SOURCE: source.replace(old, new, 1)}


def test_the_package_that_the_lies_are_made_of_is_planned(tmp_path: Path) -> None:
    assert reweft.plan(written(tmp_path / "x.pt2", {}), WEIGHTS).ok


LIES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "weights shorter than the rows": ({BLOB: records()[BLOB][:-64]}, "rows take 192 bytes, the weights record has 128"),
    "weights longer than the rows": ({BLOB: records()[BLOB] + b"x"}, "rows take 192 bytes, the weights record has 193"),
    "row larger than the weights": (stated(b"data_size = 64", b"data_size = 128"), "rows take 256 bytes"),
    "row smaller than its tensor": (stated(b"data_size = 64", b"data_size = 16"), "too small for its tensor"),
    "row of 2^64 bytes": (stated(b"data_size = 64", b"data_size = 18446744073709551615"), "more than 2^64 bytes"),
    "row of negative size": (stated(b"data_size = 64", b"data_size = -1"), "data_size"),
    "shape larger than the row": (stated(b"{2, 3}", b"{2, 30}"), "too small for its tensor"),
    "shape that overflows": (stated(b"{2, 3}", b"{4294967296, 4294967296}"), "too small for its tensor"),
    "rank of two numbers": (stated(b"{3, 1}", b"{3}"), "too small for its tensor"),
    "offset behind the row": (stated(b".offset = 0", b".offset = 99"), "too small for its tensor"),
    "two rows of one name": (stated(b'"fc.bias"', b'"fc.weight"'), "two slots have this name"),
    "row without a name": (stated(b'original_fqn = "fc.weight"', b'original_fqn = ""'), "row has no name"),
    "row that does not follow": (stated(b"constants_info_[1].name", b"constants_info_[7].name"), "does not follow"),
    "no source": ({SOURCE: None}, "no .wrapper.cpp record"),
    "no library": ({LIBRARY: None}, "no .wrapper.so record"),
    "two libraries": ({LIBRARY.replace("abc", "abd"): b""}, "has two "),
    "two weights records": ({BLOB.replace("abc", "abd"): b""}, "has two "),
    "two sources": ({SOURCE.replace("abc", "abd"): b""}, "has two "),
    "another format": ({"net/archive_format": b"pt3"}, 'archive_format is "pt3"'),
}


@pytest.mark.parametrize("name", LIES)
def test_package_that_contradicts_itself_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    changed, what = LIES[name]
    path, out = written(tmp_path / "x.pt2", changed), tmp_path / "out.pt2"
    for call in (
        lambda: reweft.plan(path, WEIGHTS),
        lambda: reweft.refit(path, WEIGHTS, out=out),
        lambda: reweft.refit(path, WEIGHTS, out=path),
    ):
        before = path.read_bytes()
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
            call()
        assert_says(error, path, what)
        assert path.read_bytes() == before
    assert not out.exists()
    assert leftovers(tmp_path) == []


def test_row_of_a_dtype_that_is_not_known_keeps_its_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt2", stated(b"dtype_float32", b"dtype_float33"))
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(path, WEIGHTS, out=tmp_path / "out.pt2", allow_missing=True, allow_unused=True)
    assert_says(error, path, "dtype is not known")
    assert not (tmp_path / "out.pt2").exists()


def test_weights_that_are_compressed_are_no_place_for_others(tmp_path: Path) -> None:
    path = written(tmp_path / "x.pt2", {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(reweft.UnsupportedError, match="record is compressed") as error:
        reweft.refit(path, WEIGHTS, out=tmp_path / "out.pt2")
    assert_says(error, path, BLOB)
    assert_hints(error)
    assert not (tmp_path / "out.pt2").exists()


def test_library_is_loaded_by_nothing_but_load(tmp_path: Path) -> None:
    """It is a few bytes that no system loads, which only `load` finds out."""
    path, out = written(tmp_path / "x.pt2", {}), tmp_path / "out.pt2"
    reweft.plan(path, WEIGHTS)
    reweft.refit(path, WEIGHTS, out=out)
    assert reweft.verify(out, WEIGHTS).equal
    with pytest.raises(reweft.ReweftError):
        rt.load(out)


class TestExported:
    """Rows of a program's configuration; what else can be wrong with them is in tests/parity/test_programs.py."""

    def changed(self, path: Path, old: bytes, new: bytes, extra: dict[str, bytes] | None = None) -> Path:
        held = records("checkpoints/exported.pt2")
        name = next(record for record in held if record.endswith("data/weights/model_weights_config.json"))
        assert old in held[name]
        held[name] = held[name].replace(old, new, 1)
        folder = name.rpartition("/")[0]
        path.write_bytes(zipped(held | {f"{folder}/{record}": data for record, data in (extra or {}).items()}))
        return path

    def test_pickle_that_calls_is_not_called(self, tmp_path: Path) -> None:
        folder = tmp_path / "made by the pickle"
        call = b"cos\nmkdir\n" + text(str(folder)) + b"\x85R"
        payload = archive(whole(pairs(text("w"), tensor(), text("evil"), call)))
        path = self.changed(tmp_path / "x.pt2", b'"use_pickle": false', b'"use_pickle": true', {"weight_0": payload})
        checkpoint = reweft.open(path)
        assert list(checkpoint)[:2] == ["fc.weight.w", "fc.bias"]
        assert "os.mkdir" in checkpoint.non_tensors["fc.weight.evil"]
        assert checkpoint.unknown_globals == ["os.mkdir"]
        assert not folder.exists()
        pickle.loads(whole(call))  # noqa: S301
        assert folder.exists()  # the pickle does what it is said to do

    @pytest.mark.parametrize("size", [b'"as_int": 3', b'"as_int": 2'])
    def test_size_that_the_record_does_not_hold(self, size: bytes, tmp_path: Path) -> None:
        path = self.changed(tmp_path / "x.pt2", size, b'"as_int": 4611686018427387904')
        with pytest.raises(reweft.FormatError) as error:
            reweft.open(path)
        assert_says(error, path)
