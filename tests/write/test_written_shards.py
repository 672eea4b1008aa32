"""Several files and an index, as the Hugging Face libraries lay them out."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_transfer import BINARY, needs_strace, zoo

import reweft
from support import assert_hints, assert_says, flip, leftovers, raw, record_at, save

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

INDEX = "net.safetensors.index.json"


def state(count: int = 10, size: int = 100) -> dict[str, torch.Tensor]:
    return {f"layer.{number}.weight": torch.full((size,), float(number)) for number in range(count)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder: Path, wanted: Mapping[str, torch.Tensor], most: int) -> None:
    """By the index alone, with the reference's loader: every tensor once, in files that are not too large."""
    index = json.loads((folder / INDEX).read_text())
    assert list(index) == ["metadata", "weight_map"]
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in wanted.values())}
    assert list(index["weight_map"]) == list(wanted)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"net-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for file in files:
        loaded = load_file(folder / file)
        assert set(loaded) == {key for key, held in index["weight_map"].items() if held == file}
        assert sum(value.nbytes for value in loaded.values()) <= most or len(loaded) == 1
        assert all(raw(value) == raw(wanted[key]) for key, value in loaded.items())
    opened = reweft.open(folder / INDEX)
    assert list(opened) == list(wanted)
    assert all(bytes(opened[key].read()) == raw(value) for key, value in wanted.items())


@pytest.mark.parametrize(("most", "count"), [(400, 10), (800, 5), (1200, 4), (1999, 3), (3999, 2)])
def test_files_are_filled_in_order(most: int, count: int, tmp_path: Path) -> None:
    path, out = save(state(), tmp_path / "x.pt"), tmp_path / "out"
    out.mkdir()
    report = reweft.convert(path, out / "net.safetensors", max_shard_size=most)
    assert_holds(out, state(), most)
    assert report.out == out / INDEX
    assert [file.name for file in report.files] == [*names(out)[: count + 1]]
    assert report.files[-1] == report.out
    assert len(report.files) == count + 1
    assert leftovers(out) == []


def test_every_layout_arrives(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    reweft.convert(save(zoo(), tmp_path / "x.pt"), out / "net.safetensors", shared="duplicate", max_shard_size="1MB")
    assert_holds(out, zoo(), 1_000_000 + 300 * 400 * 4 * 8)


@pytest.mark.parametrize("most", [4000, "4 kB", "1GB", "1GiB"])
def test_what_fits_one_file_is_one_file_without_an_index(most: int | str, tmp_path: Path) -> None:
    path, out = save(state(), tmp_path / "x.pt"), tmp_path / "out"
    out.mkdir()
    report = reweft.convert(path, out / "net.safetensors", max_shard_size=most)
    assert names(out) == ["net.safetensors"]
    assert (report.out, report.files) == (out / "net.safetensors", (out / "net.safetensors",))
    reweft.convert(path, tmp_path / "plain.safetensors")
    assert (out / "net.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    reweft.convert(save({}, tmp_path / "x.pt"), tmp_path / "net.safetensors", max_shard_size=1)
    assert load_file(tmp_path / "net.safetensors") == {}


def test_a_tensor_larger_than_a_file_has_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10), "large": torch.ones(1000), "b": torch.zeros(10)}
    out = tmp_path / "out"
    out.mkdir()
    reweft.convert(save(tensors, tmp_path / "x.pt"), out / "net.safetensors", max_shard_size=100)
    assert_holds(out, tensors, 100)
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert weight_map["a"] == weight_map["b"] != weight_map["large"]


def test_tensors_that_share_bytes_go_into_one_file(tmp_path: Path) -> None:
    tied, flat = torch.randn(50), torch.randn(100)
    tensors = {"head": tied, **state(3, 50), "tied": tied, "part": flat[:60], "other": flat[40:]}
    out = tmp_path / "out"
    out.mkdir()
    reweft.convert(save(tensors, tmp_path / "x.pt"), out / "net.safetensors", shared="duplicate", max_shard_size=500)
    assert_holds(out, tensors, 500)
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    assert weight_map["head"] == weight_map["tied"]
    assert weight_map["part"] == weight_map["other"]


def test_neighbours_in_one_storage_are_spread_and_checked_once(tmp_path: Path) -> None:
    flat = torch.randn(1 << 20)
    tensors = dict(zip("abcdefgh", flat.chunk(8), strict=True))
    path, out = save(tensors, tmp_path / "x.pt"), tmp_path / "out"
    out.mkdir()
    reweft.convert(path, out / "net.safetensors", max_shard_size="512KiB")
    assert_holds(out, tensors, 512 << 10)
    flip(path, record_at(path, "data/0")[0])
    with pytest.raises(reweft.FormatError, match="CRC"):
        reweft.convert(path, tmp_path / "net.safetensors", max_shard_size="512KiB")


def test_every_file_has_the_metadata(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.safetensors", {"format": "pt", "license": "MIT"})
    report = reweft.convert(tmp_path / "x.safetensors", tmp_path / "net.safetensors", max_shard_size=1000)
    for file in report.files[:-1]:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "license": "MIT"}


def test_from_shards_to_one_file_and_to_other_shards(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    reweft.convert(save(state(), tmp_path / "x.pt"), first / "net.safetensors", max_shard_size=900)
    reweft.convert(first / INDEX, second / "net.safetensors", max_shard_size=2000)
    assert_holds(second, state(), 2000)
    reweft.convert(second / INDEX, tmp_path / "y.safetensors")
    reweft.convert(tmp_path / "x.pt", tmp_path / "z.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "z.safetensors").read_bytes()


class TestRefusals:
    def test_a_single_file_that_loaders_would_prefer(self, tmp_path: Path) -> None:
        path = save(state(), tmp_path / "x.pt")
        (tmp_path / "net.safetensors").write_bytes(b"old")
        with pytest.raises(reweft.UsageError) as error:
            reweft.convert(path, tmp_path / "net.safetensors", max_shard_size=1000)
        assert_says(error, "net.safetensors", "before the index")
        assert_hints(error)
        assert names(tmp_path) == ["net.safetensors", "x.pt"]

    def test_an_index_that_would_be_left_behind(self, tmp_path: Path) -> None:
        path = save(state(), tmp_path / "x.pt")
        (tmp_path / INDEX).write_text("{}")
        with pytest.raises(reweft.UsageError) as error:
            reweft.convert(path, tmp_path / "net.safetensors", max_shard_size="1GB")
        assert_says(error, INDEX)
        assert names(tmp_path) == [INDEX, "x.pt"]

    def test_shards_that_are_read(self, tmp_path: Path) -> None:
        reweft.convert(save(state(), tmp_path / "x.pt"), tmp_path / "net.safetensors", max_shard_size=1000)
        before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
        (tmp_path / "other.safetensors.index.json").symlink_to(tmp_path / INDEX)
        for name, most in (
            ("net.safetensors", 1000),
            ("net.safetensors", 2000),
            ("net-00001-of-00005.safetensors", None),
        ):
            for index in (INDEX, "other.safetensors.index.json"):
                with pytest.raises(reweft.UsageError, match="replace"):
                    reweft.convert(tmp_path / index, tmp_path / name, max_shard_size=most)
        assert before == {name: (tmp_path / name).read_bytes() for name in before}

    @pytest.mark.parametrize("most", ["0", 0, "-1", -1, "five", "5XB", "", "1e9", "nan"])
    def test_sizes_that_are_none(self, most: int | str, tmp_path: Path) -> None:
        with pytest.raises(reweft.UsageError):
            reweft.convert(save(state(), tmp_path / "x.pt"), tmp_path / "net.safetensors", max_shard_size=most)
        assert names(tmp_path) == ["x.pt"]

    def test_formats_without_shards(self, tmp_path: Path) -> None:
        with pytest.raises(reweft.UsageError, match="one file"):
            reweft.convert(save(state(), tmp_path / "x.pt"), tmp_path / "net.pt", max_shard_size=1000)


def written(folder: Path, values: float, most: int) -> Path:
    tensors = {key: torch.full_like(value, values) for key, value in state().items()}
    path = save(tensors, folder / "x.pt")
    reweft.convert(path, folder / "net.safetensors", max_shard_size=most, sync=False)
    return path


def test_a_new_set_replaces_the_old_one(tmp_path: Path) -> None:
    for values, most in ((1.0, 1000), (2.0, 1000), (3.0, 2000)):
        written(tmp_path, values, most)
        opened = reweft.open(tmp_path / INDEX)
        assert all((info.numpy() == values).all() for info in opened.values())


def test_a_wrong_crc_in_the_last_file_leaves_the_old_set(tmp_path: Path) -> None:
    path = written(tmp_path, 1.0, 1000)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name != "x.pt"}
    flip(path, record_at(path, "data/9")[0])
    with pytest.raises(reweft.FormatError, match="CRC"):
        reweft.convert(path, tmp_path / "net.safetensors", max_shard_size=1000)
    assert before == {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name != "x.pt"}


@needs_strace
@pytest.mark.parametrize("most", [1000, 2000])
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "rename,renameat,renameat2", "unlink,unlinkat"])
def test_killed_at_any_step_the_index_never_leads_to_a_mix(call: str, most: int, tmp_path: Path) -> None:
    shutil.copy(written(tmp_path, 2.0, 1000), tmp_path / "new.pt")
    for path in tmp_path.glob("net*"):
        path.unlink()
    outcomes = set()
    for when in range(1, 20):
        for path in (*tmp_path.glob("net*"), *tmp_path.glob(".reweft-*")):
            path.unlink()
        written(tmp_path, 1.0, 1000)
        inject = ("-e", f"trace={call}", "-e", f"inject={call}:error=EIO:signal=KILL:when={when}")
        command = ["strace", "-f", "-o", "/dev/null", *inject, str(BINARY), "convert", "new.pt", "net.safetensors"]
        command += ["--max-shard-size", str(most)]
        done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
        if (tmp_path / INDEX).exists():
            values = {float(info.numpy()[0]) for info in reweft.open(tmp_path / INDEX).values()}
            assert len(values) == 1
            outcomes |= values
        else:
            outcomes.add(0.0)
        if done.returncode == 0:
            break
    else:
        pytest.fail("never done")
    assert 2.0 in outcomes
