"""Artifacts that reweft did not make, in every place where torch puts weights: refitted by us, run by torch."""

from __future__ import annotations

import functools
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch._inductor.package.package import load_package, package_aoti
from torch.export.pt2_archive._package import load_pt2
from torch.jit.mobile import _load_for_lite_interpreter

import models
import reweft
from support import assert_hints, assert_same, assert_says, leftovers, raw, save, stock

if TYPE_CHECKING:
    from collections.abc import Callable

KEEP: dict[str, Any] = {"always_keep_tensor_constants": True, "joint_graph_constant_folding": False}
PLACES: dict[str, dict[str, Any]] = {
    "in the library": {},
    "behind the library": {"aot_inductor.force_mmap_weights": True},
    "beside the library": {"aot_inductor.package_constants_on_disk_format": "binary_blob"},
    "as checkpoints": {"aot_inductor.package_constants_on_disk_format": "pickle_weights"},
    "as checkpoints alone": {
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
        "aot_inductor.package_constants_in_so": False,
    },
}
INPUTS: dict[type[nn.Module], Callable[[], tuple[torch.Tensor, ...]]] = {
    models.Digits: lambda: (torch.randn(2, 1, 8, 8),),
    models.Tied: lambda: (torch.arange(6).reshape(2, 3),),
    models.Mixed: lambda: (torch.randn(2, 3, 6, 6),),
    models.HalfWidth: lambda: (torch.randn(3, 8, dtype=torch.bfloat16),),
    models.Counter: lambda: (torch.ones(4),),
    models.Small: lambda: (torch.randn(2, 16),),
}
# What no state_dict has, or the program does not read.
ALLOWED: dict[type[nn.Module], dict[str, Any]] = {
    models.Mixed: {"allow_missing": True},
    models.Digits: {"allow_unused": True},
}
# Every kind of module where torch puts weights by default, one module in the other places.
CASES = [(kind, "in the library") for kind in INPUTS if kind is not models.Small]
CASES += [(models.Digits, place) for place in PLACES if place != "in the library"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def compile_once(kind: type[nn.Module], place: str, *, frozen: bool = False, dynamic: bool = False) -> Path:
        path = folder / f"{kind.__name__}-{place.replace(' ', '-')}-{frozen}-{dynamic}.pt2"
        options = {"freezing": True} if frozen else {**KEEP, **PLACES.get(place, {})}
        if place == "nowhere":
            options["aot_inductor.package_constants_in_so"] = False
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
        with torch.no_grad():
            program = torch.export.export(models.seeded(kind, 0), INPUTS[kind](), dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        return path

    return compile_once


def state(kind: type[nn.Module], seed: int, tmp_path: Path) -> Path:
    values = dict(models.seeded(kind, seed).state_dict())
    if kind is models.Digits:
        values = {key: value for key, value in values.items() if "num_batches" not in key}
    return save(values, tmp_path / f"{kind.__name__}-{seed}.pt")


def eager(kind: type[nn.Module], seed: int, *inputs: torch.Tensor) -> Any:
    module = models.seeded(kind, seed)
    if kind is models.Mixed:
        # These are in no checkpoint, so they stay what they were.
        module.window, module.offset = models.seeded(kind, 0).window, models.seeded(kind, 0).offset
    with torch.no_grad():
        return module(*inputs)


def assert_close(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "place"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_refit_of_a_package_that_torch_made(
    kind: type[nn.Module], place: str, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    package, inputs = compiled(kind, place), INPUTS[kind]()
    before, old, new = package.read_bytes(), state(kind, 0, tmp_path), state(kind, 1, tmp_path)
    allowed: dict[str, Any] = ALLOWED.get(kind, {})
    out = tmp_path / "b.pt2"
    report = reweft.refit(package, new, out=out, original=old, **allowed)
    assert 0 < report.slots_changed <= report.slots
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
    run = loaded_from_disk(out) if place == "as checkpoints alone" else functools.partial(stock, out)
    assert_close(run(*inputs), eager(kind, 1, *inputs))
    if place == "as checkpoints":
        assert_close(loaded_from_disk(out)(*inputs), eager(kind, 1, *inputs))
    assert reweft.verify(out, new, **allowed).equal
    assert not reweft.verify(package, new, **allowed).equal

    shutil.copy(package, tmp_path / "c.pt2")
    reweft.refit(tmp_path / "c.pt2", new, in_place=True, **allowed)
    assert (tmp_path / "c.pt2").read_bytes() == out.read_bytes()
    reweft.refit(tmp_path / "c.pt2", old, in_place=True, **allowed)
    assert (tmp_path / "c.pt2").read_bytes() == before
    reweft.refit(out, old, out=out, **allowed)
    assert out.read_bytes() == before == package.read_bytes()
    assert leftovers(tmp_path) == []


def loaded_from_disk(path: Path) -> Callable[..., Any]:
    """The other loader of torch: it binds the weights that lie beside the library."""
    runner: Callable[..., Any] = load_pt2(str(path), load_weights_from_disk=True).aoti_runners["model"]
    return runner


@pytest.mark.parametrize("kind", [models.Digits, models.HalfWidth, models.Tied])
def test_extract_gives_back_what_was_put_in(
    kind: type[nn.Module], compiled: Callable[..., Path], tmp_path: Path
) -> None:
    new = state(kind, 1, tmp_path)
    reweft.refit(compiled(kind, "in the library"), new, out=tmp_path / "b.pt2", **ALLOWED.get(kind, {}))
    reweft.extract(tmp_path / "b.pt2", tmp_path / "b.pt")
    reweft.extract(tmp_path / "b.pt2", tmp_path / "b.safetensors")
    wanted = torch.load(new)
    for found in (torch.load(tmp_path / "b.pt"), safetensors.torch.load_file(tmp_path / "b.safetensors")):
        # Without a manifest nothing says that the head is the embedding.
        assert set(found) == set(wanted) - {"head.weight"} or set(found) == set(wanted) - {"embedding.weight"}
        for key, value in found.items():
            assert raw(value) == raw(wanted[key]), key


def test_tied_names_that_the_package_does_not_know(compiled: Callable[..., Path], tmp_path: Path) -> None:
    package = compiled(models.Tied, "in the library")
    plan = reweft.plan(package, state(models.Tied, 1, tmp_path))
    assert plan.ok
    assert [finding.kind for finding in plan.findings] == ["alias"]
    values = {key: value.clone() for key, value in models.seeded(models.Tied, 1).state_dict().items()}
    assert reweft.plan(package, save(values, tmp_path / "same.pt")).ok
    values["head.weight"] += 1
    plan = reweft.plan(package, save(values, tmp_path / "untied.pt"))
    assert [finding.kind for finding in plan.findings if finding.blocking] == ["unused"]


def test_batch_that_is_known_at_run_time(compiled: Callable[..., Path], tmp_path: Path) -> None:
    package = compiled(models.Digits, "in the library", dynamic=True)
    reweft.refit(package, state(models.Digits, 1, tmp_path), out=tmp_path / "b.pt2")
    for batch in (2, 7):
        inputs = torch.randn(batch, 1, 8, 8)
        assert_close(stock(tmp_path / "b.pt2", inputs), eager(models.Digits, 1, inputs))


def test_buffers_that_the_program_writes_to_start_from_the_new_value(
    compiled: Callable[..., Path], tmp_path: Path
) -> None:
    values = {"weight": torch.full((4,), 2.0), "total": torch.full((4,), 10.0), "calls": torch.tensor(5)}
    reweft.refit(compiled(models.Counter, "in the library"), save(values, tmp_path / "x.pt"), out=tmp_path / "b.pt2")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "b.pt2"))
    assert_same(loaded(torch.ones(4)), (torch.full((4,), 22.0), torch.tensor(6)))
    assert_same(loaded(torch.ones(4)), (torch.full((4,), 24.0), torch.tensor(7)))


class TestFrozen:
    def test_refit_is_refused_and_says_what_to_do(self, compiled: Callable[..., Path], tmp_path: Path) -> None:
        package = compiled(models.Digits, "in the library", frozen=True)
        plan = reweft.plan(package, state(models.Digits, 1, tmp_path))
        kinds = {finding.kind for finding in plan.findings if finding.blocking}
        assert kinds >= {"unrefittable"}
        assert "unused" not in kinds
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(package, state(models.Digits, 1, tmp_path), out=tmp_path / "b.pt2")
        assert_says(error, package, "freezing=True")
        assert_hints(error)
        assert not (tmp_path / "b.pt2").exists()

    def test_slot_that_keeps_its_name_but_not_its_value(self, compiled: Callable[..., Path], tmp_path: Path) -> None:
        """Only the weights that it was compiled with can tell; here they are made to lie, as a folded value would."""
        package, old = compiled(models.Small, "in the library"), state(models.Small, 0, tmp_path)
        new = state(models.Small, 1, tmp_path)
        assert reweft.plan(package, new, original=old).ok
        other = {key: value * 2 for key, value in torch.load(old).items()}
        plan = reweft.plan(package, new, original=save(other, tmp_path / "other.pt"))
        assert [finding.kind for finding in plan.findings if finding.blocking] == ["unrefittable", "unrefittable"]
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(package, new, out=tmp_path / "b.pt2", original=tmp_path / "other.pt")
        assert_says(error, package, "original")

    def test_the_original_weights_are_not_replaced(self, compiled: Callable[..., Path], tmp_path: Path) -> None:
        package, old = compiled(models.Small, "in the library"), state(models.Small, 0, tmp_path)
        before, other = old.read_bytes(), tmp_path / "other name.pt"
        other.hardlink_to(old)
        for out in (old, other):
            with pytest.raises(reweft.UsageError) as error:
                reweft.refit(package, state(models.Small, 1, tmp_path), out=out, original=old)
            assert_says(error, out, "original")
            assert old.read_bytes() == before


def test_package_without_weights_is_refused(compiled: Callable[..., Path], tmp_path: Path) -> None:
    package = compiled(models.Small, "nowhere")
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(package, state(models.Small, 1, tmp_path), out=tmp_path / "b.pt2")
    assert_says(error, package, "compiled without its weights")
    assert_hints(error)
    assert not reweft.verify(package, state(models.Small, 0, tmp_path)).equal


def test_number_instead_of_a_name(compiled: Callable[..., Path], tmp_path: Path) -> None:
    package = compiled(models.Mixed, "in the library")
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(package, state(models.Mixed, 1, tmp_path), out=tmp_path / "b.pt2")
    assert_says(error, package, "_tensor_constant0")


def aot_files(kind: type[nn.Module], seed: int, options: dict[str, Any]) -> Any:
    with torch.no_grad():
        program = torch.export.export(models.seeded(kind, seed), INPUTS[kind]())
        return torch._inductor.aot_compile(program.module(), INPUTS[kind](), options={**KEEP, **options})


def test_two_models_in_one_package(tmp_path: Path) -> None:
    files = {
        name: aot_files(models.Small, seed, {"aot_inductor.package": True})
        for seed, name in enumerate(["first", "second"])
    }
    package = tmp_path / "two.pt2"
    package_aoti(str(package), files)
    first, second = (models.seeded(models.Small, seed).state_dict() for seed in (2, 3))
    values = {f"first.{key}": value for key, value in first.items()}
    reweft.refit(package, save(values, tmp_path / "x.pt"), out=tmp_path / "b.pt2", allow_missing=True)
    inputs = INPUTS[models.Small]()

    def run(name: str) -> Callable[..., Any]:
        loaded: Callable[..., Any] = load_package(str(tmp_path / "b.pt2"), name)
        return loaded

    assert_close(run("first")(*inputs), eager(models.Small, 2, *inputs))
    assert_close(run("second")(*inputs), eager(models.Small, 1, *inputs))
    values |= {f"second.{key}": value for key, value in second.items()}
    reweft.refit(tmp_path / "b.pt2", save(values, tmp_path / "y.pt"), in_place=True)
    assert_close(run("second")(*inputs), eager(models.Small, 3, *inputs))
    # Plain names could mean either.
    plan = reweft.plan(package, save(dict(first), tmp_path / "z.pt"))
    assert not plan.ok


def test_library_beside_its_source(tmp_path: Path) -> None:
    made = Path(aot_files(models.Small, 0, {}))
    library = Path(shutil.copytree(made.parent, tmp_path / "library")) / made.name
    reweft.refit(library, state(models.Small, 1, tmp_path), in_place=True)
    inputs = INPUTS[models.Small]()
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    assert_close(runner.run(list(inputs))[0], eager(models.Small, 1, *inputs))
    assert reweft.verify(library, state(models.Small, 1, tmp_path)).equal
    library.with_suffix(".cpp").unlink()
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.plan(library, state(models.Small, 1, tmp_path))
    assert_says(error, library, ".cpp")
    assert_hints(error)


class TestExportedProgram:
    @pytest.mark.parametrize("kind", [models.Digits, models.Tied, models.Mixed, models.HalfWidth])
    def test_outputs_are_those_of_the_new_weights(self, kind: type[nn.Module], tmp_path: Path) -> None:
        inputs, package = INPUTS[kind](), tmp_path / "a.pt2"
        torch.export.save(torch.export.export(models.seeded(kind, 0), inputs), package)
        before, new = package.read_bytes(), save(models.seeded(kind, 1).state_dict(), tmp_path / "b.pt")
        reweft.refit(package, new, out=tmp_path / "b.pt2")
        assert_same(torch.export.load(tmp_path / "b.pt2").module()(*inputs), eager(kind, 1, *inputs))
        with zipfile.ZipFile(tmp_path / "b.pt2") as archive:
            assert archive.testzip() is None
        assert reweft.verify(tmp_path / "b.pt2", new).equal
        old = save(models.seeded(kind, 0).state_dict(), tmp_path / "a.pt")
        reweft.refit(tmp_path / "b.pt2", old, in_place=True)
        assert (tmp_path / "b.pt2").read_bytes() == before
        reweft.extract(package, tmp_path / "e.pt")
        found = torch.load(tmp_path / "e.pt")
        for key, value in torch.load(old).items():
            assert raw(found[key]) == raw(value), key

    def test_tied_weights_that_differ_are_refused(self, tmp_path: Path) -> None:
        package = tmp_path / "a.pt2"
        torch.export.save(torch.export.export(models.seeded(models.Tied, 0), INPUTS[models.Tied]()), package)
        values = {key: value.clone() for key, value in models.seeded(models.Tied, 1).state_dict().items()}
        values["head.weight"] += 1
        plan = reweft.plan(package, save(values, tmp_path / "b.pt"))
        assert [finding.kind for finding in plan.findings if finding.blocking] == ["tied"]


class Scripted(nn.Module):
    """What TorchScript compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.fc(x))
        return out


class TestTorchScript:
    def script(self, path: Path, *, frozen: bool = False, mobile: bool = False) -> torch.Tensor:
        module = torch.jit.script(models.seeded(Scripted, 0))
        if frozen:
            module = torch.jit.freeze(module)
        if mobile:
            with warnings.catch_warnings(action="ignore"):  # It is deprecated; such files are not.
                module._save_for_lite_interpreter(str(path))  # type: ignore[no-untyped-call]
        else:
            torch.jit.save(module, str(path))
        return torch.randn(2, 16)

    @pytest.mark.parametrize("mobile", [False, True])
    def test_outputs_are_those_of_the_new_weights(self, mobile: bool, tmp_path: Path) -> None:  # noqa: FBT001
        path = tmp_path / "a.pt"
        inputs = self.script(path, mobile=mobile)
        before, code = path.read_bytes(), self.code(path)
        new = save(models.seeded(Scripted, 1).state_dict(), tmp_path / "new.pt")
        reweft.refit(path, new, out=tmp_path / "b.pt", allow_missing=True)
        assert self.code(tmp_path / "b.pt") == code
        loaded = torch.jit.load(str(tmp_path / "b.pt")) if not mobile else self.load_mobile(tmp_path / "b.pt")  # type: ignore[no-untyped-call]
        assert_close(loaded(inputs), eager(Scripted, 1, inputs))
        old = save(models.seeded(Scripted, 0).state_dict(), tmp_path / "old.pt")
        reweft.refit(tmp_path / "b.pt", old, in_place=True, allow_missing=True)
        assert (tmp_path / "b.pt").read_bytes() == before

    def code(self, path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            return {name: archive.read(name) for name in archive.namelist() if "/data/" not in name}

    def load_mobile(self, path: Path) -> Any:
        with warnings.catch_warnings(action="ignore"):
            return _load_for_lite_interpreter(str(path))  # type: ignore[no-untyped-call]

    def test_frozen_module_is_refused_and_says_why(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        self.script(path, frozen=True)
        new = save(models.seeded(Scripted, 1).state_dict(), tmp_path / "new.pt")
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(path, new, out=tmp_path / "b.pt", allow_unused=True)
        assert_says(error, path, "frozen")


class TestCheckpoints:
    """One command patches checkpoints too."""

    @pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
    def test_refit_of_a_checkpoint(self, container: str, tmp_path: Path) -> None:
        weight = torch.randn(50, 40)
        first = {"a": weight, "b": torch.arange(7), "t": torch.randn(6, 5).t()}
        second = {"a": weight + 1, "b": torch.arange(7) * 2, "t": torch.randn(6, 5).t()}
        path, new = tmp_path / "x", save(second, tmp_path / "new.pt")
        if container == "safetensors":
            safetensors.torch.save_file({key: value.contiguous() for key, value in first.items()}, path)
        else:
            torch.save(first, path, _use_new_zipfile_serialization=container == "zip")
        before = path.read_bytes()
        reweft.refit(path, new, out=tmp_path / "y")
        found = (
            safetensors.torch.load_file(tmp_path / "y") if container == "safetensors" else torch.load(tmp_path / "y")
        )
        for key, value in second.items():
            assert torch.equal(found[key], value), key
            assert container == "safetensors" or found[key].stride() == value.stride()
        reweft.refit(path, new, in_place=True)
        assert path.read_bytes() == (tmp_path / "y").read_bytes() != before
        stamp = path.stat().st_mtime_ns
        assert reweft.refit(path, new, in_place=True).slots_changed == 0
        assert path.stat().st_mtime_ns == stamp
        reweft.refit(path, save(first, tmp_path / "old.pt"), in_place=True)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", ["_tensor_constant0", "_frozen_param1"])
    def test_name_that_a_compiler_might_give(self, name: str, tmp_path: Path) -> None:
        path = save({name: torch.zeros(3)}, tmp_path / "x.pt")
        reweft.refit(path, save({name: torch.ones(3)}, tmp_path / "new.pt"), in_place=True)
        assert torch.equal(torch.load(path)[name], torch.ones(3))

    def test_tensors_that_share_some_bytes_are_refused(self, tmp_path: Path) -> None:
        base = torch.arange(10.0)
        path = save({"all": base, "part": base[2:4], "free": torch.ones(3)}, tmp_path / "x.pt")
        new = save({"all": torch.zeros(10), "part": torch.ones(2), "free": torch.zeros(3)}, tmp_path / "new.pt")
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(path, new, out=tmp_path / "y.pt")
        assert_says(error, path, "shares some of its bytes", "all", "part")

    def test_shard_index_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"w": "x.safetensors"}}')
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
        new = save({"w": torch.zeros(2)}, tmp_path / "new.pt")
        with pytest.raises(reweft.UnsupportedError) as error:
            reweft.refit(tmp_path / "x.safetensors.index.json", new, out=tmp_path / "y")
        assert_hints(error)
