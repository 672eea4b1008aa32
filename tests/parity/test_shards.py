"""Checkpoints of several files with an index, as the `transformers` library writes them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import reweft
from support import assert_hints, assert_says, raw, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STATE = {"a": torch.arange(4.0), "b": torch.arange(6).reshape(2, 3), "c": torch.ones(2, dtype=torch.float16)}
FILES = {"a": "model-00001-of-00002", "b": "model-00002-of-00002", "c": "model-00001-of-00002"}


def sharded(folder: Path, kind: str = "safetensors") -> Path:
    """Write `STATE` as two files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem in sorted(set(FILES.values())):
        part = {key: STATE[key] for key in STATE if FILES[key] == stem}
        if kind == "safetensors":
            save_file(part, folder / f"{stem}.{kind}", {"format": "pt"})
        else:
            save(part, folder / f"{stem}.{kind}")
    index = {"metadata": {"total_size": 68}, "weight_map": {key: f"{FILES[key]}.{kind}" for key in ("c", "a", "b")}}
    path = folder / f"model.{kind}.index.json"
    path.write_text(json.dumps(index))
    return path


def edit(path: Path, change: Callable[[dict[str, str]], object]) -> Path:
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize("mmap", [False, True])
def test_files_are_one_checkpoint(kind: str, mmap: bool, tmp_path: Path) -> None:  # noqa: FBT001
    path = sharded(tmp_path, kind)
    checkpoint = reweft.open(path, mmap=mmap)
    assert checkpoint.format == "shard index"
    assert list(checkpoint) == ["c", "a", "b"]
    for key, value in STATE.items():
        assert (checkpoint[key].shape, checkpoint[key].strides) == (tuple(value.shape), value.stride())
        assert bytes(checkpoint[key].read()) == raw(value)
    assert checkpoint.non_tensors["metadata.total_size"] == "68"
    assert checkpoint.notices == []
    if kind == "safetensors":
        assert checkpoint.metadata == {"format": "pt"}
    alone = reweft.open(tmp_path / f"model-00001-of-00002.{kind}")
    assert sorted(alone) == ["a", "c"]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded(tmp_path).parent)
    assert len(reweft.open("model.safetensors.index.json")) == 3


def test_conversion_to_one_file(tmp_path: Path) -> None:
    reweft.convert(sharded(tmp_path), tmp_path / "one.safetensors")
    one = reweft.open(tmp_path / "one.safetensors")
    assert {key: bytes(one[key].read()) for key in one} == {key: raw(value) for key, value in STATE.items()}


def test_conversion_over_a_shard_is_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    target = tmp_path / "model-00002-of-00002.safetensors"
    before = target.read_bytes()
    with pytest.raises(reweft.ReweftError):
        reweft.convert(path, target)
    assert target.read_bytes() == before


def test_index_is_an_allow_list(tmp_path: Path) -> None:
    path = edit(sharded(tmp_path), lambda files: files.pop("c"))
    checkpoint = reweft.open(path)
    assert list(checkpoint) == ["a", "b"]
    (notice,) = checkpoint.notices
    assert notice == "model-00001-of-00002.safetensors: 1 tensors are not in the index and are not read: c"


def test_key_that_its_file_lacks(tmp_path: Path) -> None:
    path = edit(sharded(tmp_path), lambda files: files.update(d="model-00001-of-00002.safetensors"))
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, '"d"', "model-00001-of-00002.safetensors", "does not hold it")


def test_key_that_another_file_holds(tmp_path: Path) -> None:
    path = edit(sharded(tmp_path), lambda files: files.update(a="model-00002-of-00002.safetensors"))
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, '"a"', "but model-00001-of-00002.safetensors holds it")


def test_key_that_two_files_hold(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"b": STATE["b"], "a": STATE["a"] + 1}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, '"a"', "both")


def test_key_that_is_there_twice(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    path.write_text(path.read_text().replace('"b":', '"a":'))
    with pytest.raises(reweft.FormatError, match="twice"):
        reweft.open(path)


def test_damage_names_the_file_that_has_it(tmp_path: Path) -> None:
    path = sharded(tmp_path, "pt")
    shard = tmp_path / "model-00002-of-00002.pt"
    data = bytearray(shard.read_bytes())
    at = data.index(raw(STATE["b"]))
    data[at] ^= 1
    shard.write_bytes(data)
    checkpoint = reweft.open(path)
    for key in ("a", "c"):
        checkpoint[key].read()
    with pytest.raises(reweft.FormatError) as error:
        checkpoint["b"].read()
    assert_says(error, shard, '"b"', "CRC")


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, shard)


def test_absent_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(OSError, match="No such file") as error:
        reweft.open(path)
    assert str(shard) in str(error.value)


BAD_NAMES = ["../x.safetensors", "/etc/passwd", "", ".", "./x", "a/../../x", "a\\..\\x", "x\n", "a/.."]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_leaves_the_folder(name: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    path = edit(sharded(tmp_path / "model"), lambda files: files.update(a=name))
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, "no path below its folder")


def test_file_in_a_folder_below(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "sub").mkdir()
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "sub" / "two.safetensors")
    assert len(reweft.open(edit(path, lambda files: files.update(b="sub/two.safetensors")))) == 3


class TestLinks:
    def test_within_the_folder(self, tmp_path: Path) -> None:
        path = sharded(tmp_path)
        shard = tmp_path / "model-00002-of-00002.safetensors"
        shard.rename(tmp_path / "other")
        shard.symlink_to("other")
        assert len(reweft.open(path)) == 3

    def test_out_of_the_folder(self, tmp_path: Path) -> None:
        path = sharded(tmp_path / "model")
        shard = path.parent / "model-00002-of-00002.safetensors"
        shard.rename(tmp_path / "secret")
        shard.symlink_to(tmp_path / "secret")
        with pytest.raises(reweft.UnsupportedError) as error:
            reweft.open(path)
        assert_says(error, shard, "leaves the folder")
        assert_hints(error)

    def test_folder_that_is_a_link(self, tmp_path: Path) -> None:
        path = sharded(tmp_path / "model")
        (tmp_path / "outside").mkdir()
        (path.parent / "model-00002-of-00002.safetensors").rename(tmp_path / "outside" / "two")
        (path.parent / "sub").symlink_to(tmp_path / "outside")
        with pytest.raises(reweft.UnsupportedError):
            reweft.open(edit(path, lambda files: files.update(b="sub/two")))

    def snapshot(self, tmp_path: Path, blobs: str) -> Path:
        """A repository as the Hugging Face cache lays it out: files are links to blobs."""
        snapshot = tmp_path / "repo" / "snapshots" / "0123abcd"
        path = sharded(snapshot)
        (tmp_path / "repo" / blobs).mkdir(parents=True)
        for number, child in enumerate(sorted(snapshot.iterdir())):
            blob = tmp_path / "repo" / blobs / str(number)
            child.rename(blob)
            child.symlink_to(os.path.relpath(blob, snapshot))
        return path

    def test_snapshot_of_the_cache(self, tmp_path: Path) -> None:
        checkpoint = reweft.open(self.snapshot(tmp_path, "blobs"))
        assert bytes(checkpoint["b"].read()) == raw(STATE["b"])

    @pytest.mark.parametrize("blobs", ["other", "blobs/deeper", "../blobs"])
    def test_snapshot_with_links_to_another_place(self, blobs: str, tmp_path: Path) -> None:
        with pytest.raises(reweft.UnsupportedError, match="leaves the folder"):
            reweft.open(self.snapshot(tmp_path, blobs))


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(OSError, match="not a regular file"):
        reweft.open(path)


def test_index_in_an_index(tmp_path: Path) -> None:
    path = edit(sharded(tmp_path), lambda files: files.update(a="model.safetensors.index.json"))
    with pytest.raises(reweft.UnsupportedError):
        reweft.open(path)


def test_folder_names_its_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    with pytest.raises(OSError, match="directory") as error:
        reweft.open(tmp_path)
    assert "model.safetensors.index.json" in str(error.value)


@pytest.mark.parametrize(
    "text", ['{"model_type": "bert"}', "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"a']
)
def test_json_that_is_no_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((reweft.UnsupportedError, reweft.FormatError)) as error:
        reweft.open(tmp_path / "config.json")
    assert_says(error, tmp_path / "config.json", "JSON")


def test_empty_index(tmp_path: Path) -> None:
    (tmp_path / "x.index.json").write_text('{"weight_map": {}}')
    assert len(reweft.open(tmp_path / "x.index.json")) == 0


def test_contradicting_metadata_is_noticed(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    save_file({"b": STATE["b"]}, tmp_path / "model-00002-of-00002.safetensors", {"format": "tf"})
    checkpoint = reweft.open(path)
    assert checkpoint.metadata == {"format": "pt"}
    assert "metadata" in checkpoint.notices[0]
