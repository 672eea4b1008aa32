"""`reweft.refit`: what is written, what stays, and that it is the same as every other way to the same weights."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
import zlib
from typing import TYPE_CHECKING

import pytest
import torch

import reweft
import reweft.torch as rt
from support import assert_same, leftovers, record_at, save, save_state, stock

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package


def refit_to(package: Package, seed: int, folder: Path, *, start: Path | None = None) -> Path:
    """Refit with the weights of a seed; gives the new package."""
    checkpoint = save_state(package.module(seed), folder / f"{seed}.pt")
    out = folder / f"{seed}.pt2"
    reweft.refit(start or package.path, checkpoint, out=out)
    return out


def test_refit_with_the_same_weights_is_byte_identical(package: Package, tmp_path: Path) -> None:
    checkpoint = save_state(package.module(0), tmp_path / "a.pt")
    report = reweft.refit(package.path, checkpoint, out=tmp_path / "a.pt2")
    assert report.slots_changed == 0
    assert (tmp_path / "a.pt2").read_bytes() == package.path.read_bytes()


def test_second_refit_forgets_the_first(package: Package, tmp_path: Path) -> None:
    first = refit_to(package, 1, tmp_path)
    second = refit_to(package, 2, tmp_path, start=first)
    direct = tmp_path / "direct.pt2"
    reweft.refit(package.path, tmp_path / "2.pt", out=direct)
    back = tmp_path / "back.pt2"
    reweft.refit(second, save_state(package.module(0), tmp_path / "0.pt"), out=back)
    assert first.read_bytes() != second.read_bytes() == direct.read_bytes()
    assert back.read_bytes() == package.path.read_bytes()


def test_refit_on_disk_live_and_loaded_give_the_same_outputs(package: Package, tmp_path: Path) -> None:
    refitted = refit_to(package, 1, tmp_path)
    live = package.load()
    rt.replace_weights(live, tmp_path / "1.pt")
    outputs = live(*package.inputs)
    assert_same(outputs, rt.load(refitted)(*package.inputs))
    assert_same(outputs, stock(refitted, *package.inputs))


def test_saved_live_model_is_the_refit_on_disk(package: Package, tmp_path: Path) -> None:
    refitted = refit_to(package, 1, tmp_path)
    live = package.load()
    rt.replace_weights(live, tmp_path / "1.pt")
    rt.save(live, tmp_path / "live.pt2")
    assert (tmp_path / "live.pt2").read_bytes() == refitted.read_bytes()
    rt.replace_weights(live, package.module(0).state_dict())
    rt.save(live, tmp_path / "live.pt2")
    assert (tmp_path / "live.pt2").read_bytes() == package.path.read_bytes()


def test_archive_and_manifest_are_true_after_a_refit(package: Package, tmp_path: Path) -> None:
    refitted = refit_to(package, 1, tmp_path)
    with zipfile.ZipFile(refitted) as archive:
        assert archive.testzip() is None
        name = next(name for name in archive.namelist() if name.endswith("extra/reweft_manifest.json"))
        manifest = json.loads(archive.read(name))
    # BLAKE3 is not in the standard library: `verify` computes it, and must see a hash that lies.
    assert reweft.verify(refitted, tmp_path / "1.pt").equal
    data = refitted.read_bytes()
    stated = manifest["slots"][0]["hash"]
    assert stated.startswith("blake3:")
    lie = stated[:-1] + ("0" if stated[-1] != "0" else "1")
    rewrite_record(refitted, name, data_of(refitted, name).replace(stated.encode(), lie.encode()))
    report = reweft.verify(refitted, tmp_path / "1.pt")
    assert not report.equal
    assert "manifest" in report.differences[0].what
    assert len(data) == refitted.stat().st_size


def data_of(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def rewrite_record(path: Path, name: str, content: bytes) -> None:
    """Overwrite a record by bytes of the same length and mend its CRC."""
    start, nbytes = record_at(path, name)
    assert len(content) == nbytes
    data = bytearray(path.read_bytes())
    old, new = (zlib.crc32(bytes(part)).to_bytes(4, "little") for part in (data[start : start + nbytes], content))
    data[start : start + nbytes] = content
    path.write_bytes(bytes(data).replace(old, new))


def test_nothing_but_weights_crcs_and_manifest_changes(digits: Package, tmp_path: Path) -> None:
    refitted = refit_to(digits, 1, tmp_path)
    with zipfile.ZipFile(digits.path) as before, zipfile.ZipFile(refitted) as after:
        assert before.namelist() == after.namelist()
        changed = {name for name in before.namelist() if before.read(name) != after.read(name)}
    assert {name.rsplit("/", 1)[1].split(".", 1)[1] for name in changed} == {"wrapper_weights.blob", "json"}


def test_report_counts(digits: Package, tmp_path: Path) -> None:
    state = digits.module(0).state_dict()
    state["fc.weight"] = state["fc.weight"] + 1
    report = reweft.refit(digits.path, save(state, tmp_path / "x.pt"), out=tmp_path / "x.pt2")
    read = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    assert (report.out, report.slots, report.slots_changed) == (tmp_path / "x.pt2", len(read), 1)
    assert report.nbytes == sum(value.numel() * value.element_size() for value in read)
    assert report.kept == ()
    assert sum("num_batches_tracked" in notice for notice in report.notices) == 2


def test_safetensors_and_a_checkpoint_object_do_the_same(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    reweft.convert(digits_b, tmp_path / "b.safetensors")
    reweft.refit(digits.path, digits_b, out=tmp_path / "1.pt2")
    reweft.refit(digits.path, tmp_path / "b.safetensors", out=tmp_path / "2.pt2")
    reweft.refit(digits.path, reweft.open(digits_b, mmap=True), out=tmp_path / "3.pt2")
    reweft.refit(digits.path, rt.checkpoint_of(torch.load(digits_b)), out=tmp_path / "4.pt2")
    assert len({(tmp_path / f"{number}.pt2").read_bytes() for number in range(1, 5)}) == 1


def test_training_checkpoint_with_a_prefix(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in torch.load(digits_b).items()}
    path = save({"epoch": 3, "model_state_dict": state, "optimizer": {"lr": torch.ones(1)}}, tmp_path / "t.pt")
    keys = reweft.KeyMap([(r"^module\.", "")])
    out = tmp_path / "t.pt2"
    reweft.refit(digits.path, path, out=out, top_level_key="model_state_dict", keys=keys)
    reweft.refit(digits.path, digits_b, out=tmp_path / "b.pt2")
    assert out.read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_verify_tells_equal_from_different(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    refitted = tmp_path / "b.pt2"
    reweft.refit(digits.path, digits_b, out=refitted)
    report = reweft.verify(refitted, digits_b)
    assert report.equal
    assert report.differences == ()
    assert report.slots == len(reweft.plan(refitted, digits_b))
    report = reweft.verify(digits.path, digits_b)
    assert not report.equal
    assert {finding.slot for finding in report.differences} >= {"fc.weight", "scale", "bn1.running_var"}
    assert {finding.kind for finding in report.differences} == {"value"}


def test_verify_sees_one_changed_bit(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    refitted = tmp_path / "b.pt2"
    reweft.refit(digits.path, digits_b, out=refitted)
    state = torch.load(digits_b)
    state["shift"].view(torch.int32)[0] ^= 1
    report = reweft.verify(refitted, save(state, tmp_path / "c.pt"))
    assert [finding.slot for finding in report.differences] == ["shift"]


def test_output_may_be_the_artifact_itself(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.pt2"
    shutil.copy(digits.path, own)
    serving = rt.load(own)
    before = serving(*digits.inputs)
    reweft.refit(own, digits_b, out=own)
    reweft.refit(digits.path, digits_b, out=tmp_path / "b.pt2")
    assert own.read_bytes() == (tmp_path / "b.pt2").read_bytes()
    assert_same(serving(*digits.inputs), before)  # it has the old file mapped, which the rename left alone
    assert leftovers(tmp_path) == []


def test_output_must_not_be_the_checkpoint(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    before = digits_b.read_bytes()
    (tmp_path / "link").symlink_to(digits_b)
    for out in (digits_b, tmp_path / "link"):
        with pytest.raises(reweft.UsageError, match="checkpoint"):
            reweft.refit(digits.path, digits_b, out=out)
    assert digits_b.read_bytes() == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("mode", [0o640, 0o444, 0o755])
def test_file_mode_is_kept(mode: int, digits: Package, digits_b: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.pt2"
    shutil.copy(digits.path, own)
    own.chmod(mode)
    reweft.refit(own, digits_b, out=tmp_path / "new.pt2")
    reweft.refit(own, digits_b, out=own)
    assert stat.S_IMODE((tmp_path / "new.pt2").stat().st_mode) == mode
    assert stat.S_IMODE(own.stat().st_mode) == mode


@pytest.mark.parametrize("out", ["absent/x.pt2", "folder"])
def test_output_that_cannot_be_written(out: str, digits: Package, digits_b: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(reweft.IoError) as error:
        reweft.refit(digits.path, digits_b, out=tmp_path / out)
    assert error.value.path == tmp_path / out
    assert isinstance(error.value, OSError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.pt", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_plan_is_data(digits: Package, digits_b: Path) -> None:
    plan = reweft.plan(digits.path, digits_b)
    assert plan.ok
    plan.check()
    assert plan.recipes["fc.weight"] == [{"op": "leaf", "key": "fc.weight"}]
    assert plan.kept == []
    assert {finding.kind for finding in plan.findings} == {"not-read"}
    assert json.loads(plan.to_json())["refills"][0].keys() == {"slot", "name", "recipe", "nbytes"}
    assert repr(len(plan)) in repr(plan)


def test_plan_of_other_layouts_and_dtypes(mixed: Package, tmp_path: Path) -> None:
    state = mixed.module(1).state_dict()
    state["conv.weight"] = state["conv.weight"].contiguous()
    state["conv.bias"] = state["conv.bias"].double()
    plan = reweft.plan(mixed.path, save(state, tmp_path / "x.pt"), allow_cast=True)
    assert plan.recipes["conv.weight"] == [
        {"op": "leaf", "key": "conv.weight"},
        {"op": "restride", "strides": [27, 1, 9, 3]},
    ]
    assert plan.recipes["conv.bias"][1] == {"op": "cast", "from": "float64", "to": "float32"}


def test_package_without_weights_has_nothing_to_refit(weightless: Package, tmp_path: Path) -> None:
    empty = save({}, tmp_path / "empty.pt")
    report = reweft.refit(weightless.path, empty, out=tmp_path / "x.pt2")
    assert (report.slots, report.nbytes) == (0, 0)
    assert (tmp_path / "x.pt2").read_bytes() == weightless.path.read_bytes()
    with pytest.raises(reweft.MismatchError):
        reweft.refit(weightless.path, save({"w": torch.ones(1)}, tmp_path / "w.pt"), out=tmp_path / "x.pt2")
