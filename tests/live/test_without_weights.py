"""Packages without weights: filled when they are loaded or later, and a clear error before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import reweft
import reweft.torch as rt
from support import assert_same, differs, flip, raw, record_at, save_state

if TYPE_CHECKING:
    from support import Package


def stripped(package: Package, folder: Path) -> Path:
    path = folder / f"{package.path.stem}-stripped.pt2"
    rt.save(package.load(), path, inline_weights=False)
    return path


def test_filled_from_every_source_it_is_the_whole_model(package: Package, tmp_path: Path) -> None:
    path, module = stripped(package, tmp_path), package.module(1)
    assert path.stat().st_size < 3 << 20
    values = [value for value in package.module(0).state_dict().values() if value.is_contiguous()]
    largest = max(values, key=lambda value: value.nbytes)
    assert raw(largest) in package.path.read_bytes()
    assert raw(largest) not in path.read_bytes()
    wanted = package.load()
    rt.replace_weights(wanted, module.state_dict())
    file = save_state(module, tmp_path / "b.pt")
    reweft.convert(file, tmp_path / "b.safetensors", shared="duplicate")
    whole = package.load()
    rt.replace_weights(whole, module.state_dict())
    sources: list[Any] = [
        module.state_dict(),
        file,
        tmp_path / "b.safetensors",
        reweft.open(file),
        reweft.open(file, mmap=True),
        whole,
    ]
    outputs = wanted(*package.inputs)
    for source in sources:
        model = rt.load(path, weights=source)
        assert not model.inline_weights
        assert model.load_report is not None
        assert model.load_report.slots > 0
        assert_same(model(*package.inputs), outputs)
    later = rt.load(path)
    assert later.load_report is None
    rt.replace_weights(later, module.state_dict())
    assert_same(later(*package.inputs), outputs)


def test_module_fills_also_what_no_state_dict_has(mixed: Package, tmp_path: Path) -> None:
    model = rt.load(stripped(mixed, tmp_path), weights=mixed.module(1))
    wanted = mixed.load()
    rt.replace_weights(wanted, mixed.module(1))
    assert_same(model(*mixed.inputs), wanted(*mixed.inputs))
    program = torch.export.export(mixed.module(1), mixed.inputs)
    assert_same(rt.load(stripped(mixed, tmp_path), weights=program)(*mixed.inputs), wanted(*mixed.inputs))


def test_mapped_file_is_bound_without_a_copy(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    model = rt.load(stripped(digits, tmp_path), weights=digits_b)
    report = model.load_report
    assert report is not None
    assert (report.bytes_copied, report.kept) == (0, ())
    assert str(digits_b) in Path("/proc/self/maps").read_text()
    model = rt.load(stripped(digits, tmp_path), weights=digits.module(1))
    assert model.load_report is not None
    assert model.load_report.bytes_copied == model.load_report.nbytes > 0


def test_refitted_twice_and_in_parts(digits: Package, tmp_path: Path) -> None:
    path = stripped(digits, tmp_path)
    model, wanted = rt.load(path), digits.load()
    part = {"fc.bias": digits.module(2).state_dict()["fc.bias"]}
    for strict in (True, False):
        with pytest.raises(reweft.MismatchError, match="stripped"):
            rt.replace_weights(model, part, strict=strict)
        with pytest.raises(reweft.MismatchError, match="stripped"):
            rt.load(path, weights=part, strict=strict)
    with pytest.raises(reweft.RunError):
        model(*digits.inputs)
    for weights in (digits.module(1).state_dict(), digits.module(0).state_dict()):
        rt.replace_weights(model, weights)
        rt.replace_weights(wanted, weights)
        assert_same(model(*digits.inputs), wanted(*digits.inputs))
    with pytest.raises(reweft.MismatchError):
        rt.replace_weights(model, part)
    for one in (model, wanted):
        rt.replace_weights(one, part, strict=False)
    assert_same(model(*digits.inputs), wanted(*digits.inputs))
    assert model.weights_version == wanted.weights_version


def test_slots_that_no_state_dict_has_keep_their_value(mixed: Package, tmp_path: Path) -> None:
    path = stripped(mixed, tmp_path)
    assert_same(rt.load(path, weights=mixed.module(0).state_dict())(*mixed.inputs), mixed.load()(*mixed.inputs))
    model = mixed.load()
    rt.replace_weights(model, mixed.module(1))
    rt.save(model, path, inline_weights=False)
    report = rt.load(path, weights=mixed.module(0).state_dict()).load_report
    assert report is not None
    assert set(report.kept) == {"window", "offset"}
    wanted = mixed.load()
    rt.replace_weights(wanted, mixed.module(1))
    rt.replace_weights(wanted, mixed.module(0).state_dict())
    assert_same(rt.load(path, weights=mixed.module(0).state_dict())(*mixed.inputs), wanted(*mixed.inputs))


def test_running_it_unfilled_is_an_error_and_no_crash(digits: Package, tmp_path: Path) -> None:
    path = stripped(digits, tmp_path)
    code = (
        "import sys, torch, reweft, reweft.torch as rt\n"
        "model = rt.load(sys.argv[1], replicas=2)\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        model(torch.randn(2, 1, 8, 8))\n"
        "    except reweft.RunError as error:\n"
        "        print(error)\n"
    )
    folders = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("has no weights for") == 3
    assert "conv1.weight" in done.stdout
    assert "hint: give them with load(path, weights=...)" in done.stdout


def test_what_is_saved_of_it(digits: Package, tmp_path: Path) -> None:
    path = stripped(digits, tmp_path)
    rt.save(rt.load(path, weights=digits.module(0).state_dict()), tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()
    model = rt.load(path, weights=digits.module(1).state_dict())
    rt.save(model, tmp_path / "again.pt2")
    assert not rt.load(tmp_path / "again.pt2").inline_weights
    rt.save(model, tmp_path / "whole.pt2", inline_weights=True)
    whole = rt.load(tmp_path / "whole.pt2")
    assert whole.inline_weights
    assert_same(whole(*digits.inputs), model(*digits.inputs))
    assert_same(torch._inductor.aoti_load_package(str(tmp_path / "whole.pt2"))(*digits.inputs), model(*digits.inputs))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.pt2", path.name, "whole.pt2"]


def test_save_without_weights_that_fails_leaves_nothing(digits: Package, weightless: Package, tmp_path: Path) -> None:
    with pytest.raises(reweft.UsageError):
        rt.save(weightless.load(), tmp_path / "x.pt2", inline_weights=False)
    with pytest.raises(reweft.IoError):
        rt.save(digits.load(), tmp_path / "nowhere" / "x.pt2", inline_weights=False)
    assert list(tmp_path.iterdir()) == []


class TestWeightsThatTakeThePlaceOfPackagedOnes:
    """`load(path, weights=...)` of a whole package."""

    def test_outputs_are_theirs(self, package: Package) -> None:
        wanted = package.load()
        rt.replace_weights(wanted, package.module(1))
        model = rt.load(package.path, weights=package.module(1))
        assert_same(model(*package.inputs), wanted(*package.inputs))

    def test_damaged_weights_that_nobody_uses_are_not_read(self, digits: Package, tmp_path: Path) -> None:
        path = tmp_path / "damaged.pt2"
        path.write_bytes(digits.path.read_bytes())
        flip(path, record_at(path, ".blob")[0] + 8)
        with pytest.raises(reweft.FormatError):
            rt.load(path)
        model = rt.load(path, weights=digits.module(1).state_dict())
        wanted = digits.load()
        rt.replace_weights(wanted, digits.module(1))
        assert_same(model(*digits.inputs), wanted(*digits.inputs))

    def test_damaged_weights_that_are_kept_are_found(self, digits: Package, tmp_path: Path) -> None:
        path = tmp_path / "damaged.pt2"
        path.write_bytes(digits.path.read_bytes())
        start, nbytes = record_at(path, ".blob")
        bias = digits.load().state_dict()["fc.bias"].numpy().tobytes()
        at = digits.path.read_bytes().index(bias, start, start + nbytes)
        flip(path, at)
        state = digits.module(1).state_dict()
        del state["fc.bias"]
        with pytest.raises(reweft.FormatError):
            rt.load(path, weights=state, strict=False)
        whole = rt.load(digits.path, weights=state, strict=False)
        assert_same(whole.state_dict()["fc.bias"], digits.load().state_dict()["fc.bias"])
        assert whole.load_report is not None
        assert whole.load_report.kept == ("fc.bias",)

    def test_weights_that_do_not_fit_are_refused(self, digits: Package, tied: Package) -> None:
        with pytest.raises(reweft.MismatchError):
            rt.load(digits.path, weights=tied.module(0))
        with pytest.raises(reweft.UsageError):
            rt.load(digits.path, keys=reweft.KeyMap([("a", "b")]))
        with pytest.raises(reweft.UsageError):
            rt.load(digits.path, weights=3)  # type: ignore[arg-type]

    def test_key_map_and_top_level_key(self, digits: Package, tmp_path: Path) -> None:
        state = {f"module.{key}": value for key, value in digits.module(1).state_dict().items()}
        torch.save({"epoch": 3, "model": state}, tmp_path / "c.pt")
        keys = reweft.KeyMap([(r"^module\.", "")])
        model = rt.load(digits.path, weights=tmp_path / "c.pt", top_level_key="model", keys=keys)
        wanted = digits.load()
        rt.replace_weights(wanted, digits.module(1))
        assert_same(model(*digits.inputs), wanted(*digits.inputs))
        assert differs(model(*digits.inputs), digits.load()(*digits.inputs))
