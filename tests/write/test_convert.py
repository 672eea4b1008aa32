"""What every conversion promises, whatever its target format."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import reweft
from support import assert_hints, assert_says, flip, leftovers, record_at, save

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save({"a": torch.arange(4.0), "b": torch.ones(3)}, tmp_path / "x.pt")


def test_the_extension_chooses_the_format_and_the_caller_overrides_it(source: Path, tmp_path: Path) -> None:
    reweft.convert(source, tmp_path / "upper.SAFETENSORS")
    reweft.convert(source, tmp_path / "named.bin.tmp", format="safetensors")
    assert (tmp_path / "upper.SAFETENSORS").read_bytes() == (tmp_path / "named.bin.tmp").read_bytes()


@pytest.mark.parametrize("name", ["x", "x.gguf", ".safetensors", "x.safetensors.part"])
def test_unknown_extension_lists_the_known_ones(name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(reweft.UsageError) as error:
        reweft.convert(source, tmp_path / name)
    assert_says(error, name, ".safetensors")
    assert_hints(error)
    assert not (tmp_path / name).exists()


def test_unknown_format_lists_the_known_ones(source: Path, tmp_path: Path) -> None:
    with pytest.raises(reweft.UsageError, match="safetensors"):
        reweft.convert(source, tmp_path / "x", format="gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize("sync", [True, False])
def test_synced_or_not_the_bytes_are_the_same(sync: bool, source: Path, tmp_path: Path) -> None:  # noqa: FBT001
    reweft.convert(source, tmp_path / "x.safetensors", sync=sync)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.arange(4.0))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(mask: int, wanted: int, source: Path, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        reweft.convert(source, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == wanted


def test_a_tensor_named_as_the_formats_metadata_is_refused(tmp_path: Path) -> None:
    path = save({"__metadata__": torch.ones(1), "w": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.convert(path, tmp_path / "x.safetensors")
    assert_says(error, path, "__metadata__")
    assert_hints(error)
    assert not (tmp_path / "x.safetensors").exists()
    reweft.convert(path, tmp_path / "x.safetensors", keys=reweft.KeyMap([("^__metadata__$", "metadata")]))
    assert set(load_file(tmp_path / "x.safetensors")) == {"metadata", "w"}


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_that_is_read_is_not_replaced_under_any_name(mmap: bool, source: Path, tmp_path: Path) -> None:  # noqa: FBT001
    before = source.read_bytes()
    (tmp_path / "symlink").symlink_to(source)
    (tmp_path / "hardlink").hardlink_to(source)
    checkpoint = reweft.open(source, mmap=mmap)
    for name in ("x.pt", "symlink", "hardlink", "./x.pt"):
        with pytest.raises(reweft.UsageError, match="replace"):
            reweft.convert(checkpoint, tmp_path / name, format="safetensors")
    assert source.read_bytes() == before


def test_replacing_the_file_behind_a_mapping_does_not_change_what_is_mapped(tmp_path: Path) -> None:
    old, new = torch.arange(5.0), torch.ones(5)
    save({"w": old}, tmp_path / "old.pt")
    save({"w": new}, tmp_path / "new.pt")
    reweft.convert(tmp_path / "old.pt", tmp_path / "x.safetensors")
    mapped = reweft.open(tmp_path / "x.safetensors", mmap=True)
    reweft.convert(tmp_path / "new.pt", tmp_path / "x.safetensors")
    assert mapped["w"].numpy().tolist() == old.tolist()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], new)


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_wrong_crc_leaves_the_target_as_it_was(key: str, source: Path, tmp_path: Path) -> None:
    start, _ = record_at(source, f"data/{'ab'.index(key)}")
    flip(source, start + 3)
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(reweft.FormatError) as error:
        reweft.convert(source, out)
    assert_says(error, source, key, "CRC")
    assert out.read_bytes() == b"old"
    assert leftovers(tmp_path) == []
