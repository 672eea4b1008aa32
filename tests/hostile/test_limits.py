"""Every limit is named in the error that it causes, and can be raised or lowered by the caller."""

from __future__ import annotations

import dataclasses
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

import reweft
from reweft import _core
from support import save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def dumped(value: object, path: Path) -> Path:
    path.write_bytes(pickle.dumps(value, 2))
    return path


def deflated(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"N0" * 2_000_000 + b"N.")
        archive.writestr("a/version", b"3\n")
    return path


def shared_widely(path: Path) -> Path:
    inner = dict.fromkeys(range(100))
    return dumped([inner] * 5_000, path)


def header(path: Path) -> Path:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x07")
    return path


def digits(path: Path) -> Path:
    path.write_bytes(b"\x80\x02L" + b"9" * 5_000 + b"L\n.")
    return path


# A file for each limit, a value that it exceeds (None: the default), and one that lets it pass.
FILES: dict[str, tuple[Callable[[Path], Path], int | None, int]] = {
    "max_keys": (lambda path: save({str(i): torch.ones(1) for i in range(9)}, path), 5, 20),
    "max_key_nbytes": (lambda path: save({"x" * 5_000: torch.ones(1)}, path), None, 6_000),
    "max_expansion": (shared_widely, None, 10_000),
    "max_metadata_nbytes": (lambda path: save({"a": torch.ones(1)}, path), 50, 5_000),
    "max_inflation": (deflated, None, 2_000),
    "max_header_nbytes": (header, 10, 100),
    "max_nodes": (lambda path: dumped(list(range(300)), path), 100, 1_000),
    "max_memo": (lambda path: dumped([str(i) for i in range(20)], path), 10, 100),
    "max_int_digits": (digits, None, 6_000),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("in_memory", [False, True])
def test_limit_is_named_and_can_be_raised(name: str, in_memory: bool, tmp_path: Path) -> None:  # noqa: FBT001
    make, low, high = FILES[name]
    path = make(tmp_path / "x.bin")
    source = path.read_bytes() if in_memory else path
    with pytest.raises(reweft.LimitError, match=name):
        reweft.open(source, limits=reweft.Limits(**{name: low}))
    reweft.open(source, limits=reweft.Limits(**{name: high}))


def test_limit_of_a_tensor_that_repeats_its_storage(tmp_path: Path) -> None:
    path = save({"w": torch.ones(1).expand(1_000)}, tmp_path / "x.pt")
    low = reweft.open(path, limits=reweft.Limits(max_repeated_nbytes=3_999))
    with pytest.raises(reweft.LimitError, match="max_repeated_nbytes"):
        low["w"].read()
    assert len(reweft.open(path, limits=reweft.Limits(max_repeated_nbytes=4_000))["w"].read()) == 4_000


def test_limits_of_a_config(tmp_path: Path) -> None:
    path = dumped({"a": list(range(300))}, tmp_path / "x.pkl")
    with pytest.raises(reweft.LimitError, match="max_nodes"):
        reweft.load_config(path, limits=reweft.Limits(max_nodes=100))
    assert reweft.load_config(path)["a"][299] == 299


def test_every_limit_of_the_face_is_one_of_the_engine(tmp_path: Path) -> None:
    path = save({"a": torch.ones(1)}, tmp_path / "x.pt")
    names = {field.name for field in dataclasses.fields(reweft.Limits)}
    assert names == {*FILES, "max_repeated_nbytes"}
    everything: dict[str, Any] = dict.fromkeys(names, 1 << 40)
    assert list(reweft.open(path, limits=reweft.Limits(**everything))) == ["a"]
    with pytest.raises(reweft.UsageError, match="no limit"):
        _core.Checkpoint.open(path, top_level_key=None, keys=None, mmap=False, limits={"max_anything": 1})
