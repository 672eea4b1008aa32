"""Artifacts without their weights: who reads them, who must not, and what a refit makes of them."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

import models
import reweft
import reweft.torch as rt
from support import assert_hints, assert_same, assert_says, flip, leftovers, record_at, save, save_state, stock

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package


@pytest.fixture
def stripped(digits: Package, tmp_path: Path) -> Path:
    reweft.strip(digits.path, tmp_path / "net.stripped")
    return tmp_path / "net.stripped"


def test_file_is_as_small_as_the_program(digits: Package, stripped: Path) -> None:
    report = reweft.strip(digits.path, stripped)
    assert report.out_nbytes == stripped.stat().st_size
    assert abs(digits.path.stat().st_size - report.nbytes - report.out_nbytes) < 2048
    weights = digits.module(0).state_dict()
    assert report.nbytes == sum(value.nbytes for key, value in weights.items() if "num_batches" not in key)
    with zipfile.ZipFile(stripped) as archive:
        assert archive.testzip() is None
    data = stripped.read_bytes()
    for value in weights.values():
        if value.nbytes > 64:
            assert value.detach().numpy().tobytes() not in data


def test_refit_gives_what_a_refit_of_the_whole_gives(digits: Package, stripped: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        weights = save_state(digits.module(seed), tmp_path / f"{seed}.pt")
        for name, artifact in [("whole", digits.path), ("filled", stripped)]:
            reweft.refit(artifact, weights, out=tmp_path / name)
        assert (tmp_path / "filled").read_bytes() == (tmp_path / "whole").read_bytes()
        assert reweft.verify(tmp_path / "filled", weights).equal
    assert_same(rt.load(tmp_path / "filled")(*digits.inputs), rt.load(tmp_path / "whole")(*digits.inputs))
    torch.testing.assert_close(stock(tmp_path / "filled", *digits.inputs), digits.eager(1))


def test_a_slot_without_a_key_is_refused_whatever_is_allowed(digits: Package, stripped: Path, tmp_path: Path) -> None:
    weights = dict(digits.module(1).state_dict())
    key = next(key for key, value in weights.items() if value.dim() > 1)
    del weights[key]
    path = save(weights, tmp_path / "x.pt")
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(stripped, path, out=tmp_path / "b.pt2", allow_missing=True)
    assert_says(error, key, stripped, "was stripped")
    assert not (tmp_path / "b.pt2").exists()
    assert leftovers(tmp_path) == []


def refuse(call: Any, path: Path) -> None:
    with pytest.raises(reweft.UnsupportedError) as error:
        call()
    assert_says(error, path, "stripped")
    assert_hints(error)


def test_nobody_takes_zeros_for_weights(digits: Package, stripped: Path, tmp_path: Path) -> None:
    before, weights = stripped.read_bytes(), save_state(digits.module(0), tmp_path / "x.pt")
    with pytest.raises(reweft.RunError, match="no weights") as error:
        rt.load(stripped)(*digits.inputs)
    assert_says(error, stripped)
    assert_hints(error)
    refuse(lambda: reweft.open(stripped), stripped)
    refuse(lambda: reweft.extract(stripped, tmp_path / "y.pt"), stripped)
    refuse(lambda: reweft.verify(stripped, weights), stripped)
    refuse(lambda: reweft.refit(stripped, weights, in_place=True), stripped)
    refuse(lambda: reweft.plan(stripped, weights, original=weights), stripped)
    refuse(lambda: reweft.diff(stripped, weights), stripped)
    with pytest.raises(Exception, match=r".") as stock_error:
        stock(stripped, *digits.inputs)
    assert not isinstance(stock_error.value, reweft.ReweftError)
    for load in (torch.load, torch.export.load, torch.jit.load, safetensors.torch.load_file):
        with pytest.raises(Exception, match=r"."):
            load(stripped)
    assert stripped.read_bytes() == before


def test_twice_is_refused(stripped: Path, tmp_path: Path) -> None:
    with pytest.raises(reweft.UsageError) as error:
        reweft.strip(stripped, tmp_path / "again")
    assert_says(error, stripped, "stripped already")


def test_what_is_kept(digits: Package, tmp_path: Path) -> None:
    state = dict(digits.module(1).state_dict())
    kept = [key for key in state if key.endswith(".bias") or "running" in key]
    out = tmp_path / "net.stripped"
    report = reweft.strip(digits.path, out, keep=[r"\.bias$", "running"])
    assert sorted(report.kept) == sorted(kept)
    path = save({key: value for key, value in state.items() if key not in kept}, tmp_path / "x.pt")
    for name, artifact in [("whole", digits.path), ("filled", out)]:
        reweft.refit(artifact, path, out=tmp_path / name, allow_missing=True)
    assert (tmp_path / "filled").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(reweft.UsageError, match="no slot has a name"):
        reweft.strip(digits.path, out, keep=["^biases"])
    with pytest.raises(reweft.UsageError, match="pattern"):
        reweft.strip(digits.path, out, keep=["("])


def test_damage_is_found(digits: Package, stripped: Path, tmp_path: Path) -> None:
    weights = save_state(digits.module(1), tmp_path / "x.pt")
    damaged = tmp_path / "damaged.pt2"
    damaged.write_bytes(digits.path.read_bytes())
    start, nbytes = record_at(damaged, ".wrapper_weights.blob")
    flip(damaged, start + nbytes // 2)
    with pytest.raises(reweft.FormatError, match="CRC"):
        reweft.strip(damaged, tmp_path / "out")
    start, nbytes = record_at(stripped, "about.json")
    data = bytearray(stripped.read_bytes())
    at = start + bytes(data[start : start + nbytes]).index(b"[[") + 2
    data[at] = ord("9") if data[at] != ord("9") else ord("1")
    stripped.write_bytes(data)
    with pytest.raises(reweft.FormatError) as error:
        reweft.refit(stripped, weights, out=tmp_path / "out")
    assert_says(error, stripped, "CRC")
    assert not (tmp_path / "out").exists()


def rewritten(stripped: Path, change: Any) -> None:
    """Another first record, with the right CRCs, as somebody would make it who wants to mislead."""
    with zipfile.ZipFile(stripped) as archive:
        about, rest = (archive.read(f"reweft_stripped/{name}") for name in ("about.json", "rest"))
    stated = json.loads(about)
    rest = change(stated, rest)
    with zipfile.ZipFile(stripped, "w") as archive:
        archive.writestr("reweft_stripped/about.json", json.dumps(stated))
        archive.writestr("reweft_stripped/rest", rest)


def test_gap_that_hides_code_is_refused(digits: Package, stripped: Path, tmp_path: Path) -> None:
    start = record_at(digits.path, ".wrapper.so")[0] + 4096

    def hide(stated: dict[str, Any], rest: bytes) -> bytes:
        at = start - sum(other[1] - other[0] for other in stated["left_out"] if other[0] < start)
        stated["left_out"] = sorted([*stated["left_out"], [start, start + 8]])
        return rest[:at] + rest[at + 8 :]

    rewritten(stripped, hide)
    with pytest.raises(reweft.FormatError, match="not those of slots"):
        reweft.plan(stripped, save({}, tmp_path / "x.pt"))


@pytest.mark.parametrize(
    "change",
    [
        lambda stated, rest: stated.update(nbytes=stated["nbytes"] + 1) or rest,
        lambda stated, rest: stated.update(left_out=[]) or rest,
        lambda stated, rest: stated.update(left_out=stated["left_out"][::-1] * 2) or rest,
        lambda stated, rest: stated.update(version=2) or rest,
        lambda stated, _: stated.update(left_out=[[0, 2**64 - 1]], nbytes=2**64 - 1) or b"",
        lambda _, rest: rest[:-1],
    ],
    ids=["longer", "no gaps", "out of order", "newer", "all of it", "shorter"],
)
def test_records_that_disagree_are_refused(change: Any, stripped: Path, tmp_path: Path) -> None:
    rewritten(stripped, change)
    with pytest.raises(reweft.ReweftError) as error:
        reweft.plan(stripped, save({}, tmp_path / "x.pt"))
    assert_says(error, stripped)


def test_library_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(reweft.ReweftError):
        reweft.strip(save({"a": torch.empty(0)}, tmp_path / "x.pt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_weights_are_left_out_once(tmp_path: Path) -> None:
    module = models.seeded(models.Tied, 0)
    path = save_state(module, tmp_path / "x.pt")
    report = reweft.strip(path, tmp_path / "out")
    assert report.slots < len(module.state_dict())
    reweft.refit(tmp_path / "out", path, out=tmp_path / "y.pt")
    assert (tmp_path / "y.pt").read_bytes() == path.read_bytes()
