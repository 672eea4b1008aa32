"""Frozen programs: after a refit they are, byte for byte, what a frozen compilation with the new weights would be."""

from __future__ import annotations

import ctypes
import json
import operator
import re
import subprocess
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import reweft
import reweft.torch as rt
from frozen_models import MODELS, Masked, SmallResNet, seeded_frozen
from reweft.torch import replay
from support import assert_same, assert_says, child, save_state, stock, with_manifest, with_record

if TYPE_CHECKING:
    from collections.abc import Callable

BINARY = Path(__file__).parents[2] / "target/release/reweft"

# Models with rows that torch has to make, and what with.
BY_TORCH = {"weight-norm": "aten::sum", "clip": "aten::exp", "spectral": "aten::_fft_r2c"}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Packages of models that were frozen with the weights of a seed, made once each."""
    made: dict[tuple[str, int], Path] = {}

    def package(name: str, seed: int) -> Path:
        if (name, seed) not in made:
            kind, inputs = MODELS[name]
            model = rt.trace(seeded_frozen(kind, seed), inputs, freeze=True, options={"compare_code": seed == 0})
            made[name, seed] = tmp_path_factory.mktemp("frozen") / f"{name}-{seed}.pt2"
            rt.save(model, made[name, seed])
        return made[name, seed]

    return package


def state(name: str, seed: int, folder: Path) -> Path:
    """A file of the weights of a seed."""
    return save_state(seeded_frozen(MODELS[name][0], seed), folder / f"{name}-{seed}.pt")


def command(*line: object) -> subprocess.CompletedProcess[str]:
    """Run the standalone binary, in which there is no torch."""
    return subprocess.run([BINARY, *map(str, line)], capture_output=True, text=True, timeout=120, check=False)


def manifest(package: Path) -> dict[str, Any]:
    """What the package says of itself."""
    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith("reweft_manifest.json"))
        found: dict[str, Any] = json.loads(archive.read(name))
    return found


def rows(package: Path) -> dict[str, str]:
    """The hash of the bytes of every row, which the manifest states and `verify` compares."""
    return {slot["constant"]: slot["hash"] for slot in manifest(package)["slots"]}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_refit_gives_the_bytes_of_a_new_compilation(
    name: str, frozen: Callable[[str, int], Path], tmp_path: Path
) -> None:
    inputs = MODELS[name][1]
    old, new = frozen(name, 0), frozen(name, 1)
    there, back = tmp_path / "there.pt2", tmp_path / "back.pt2"
    reweft.refit(old, state(name, 1, tmp_path), out=there)
    assert rows(there) == rows(new) != rows(old)
    wanted = rt.load(new)(*inputs)
    assert_same(stock(there, *inputs), wanted)
    assert reweft.verify(there, state(name, 1, tmp_path)).equal
    reweft.refit(there, state(name, 0, tmp_path), out=back)
    assert back.read_bytes() == old.read_bytes()

    model = rt.load(old)
    before = model(*inputs)
    rt.replace_weights(model, state(name, 1, tmp_path))
    assert_same(model(*inputs), wanted)
    rt.save(model, tmp_path / "saved.pt2")
    assert rows(tmp_path / "saved.pt2") == rows(new)
    rt.replace_weights(model, seeded_frozen(MODELS[name][0], 0))
    assert_same(model(*inputs), before)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_special_weights_are_as_good_as_others(value: float, frozen: Callable[[str, int], Path]) -> None:
    """A compiler that looked at values would treat these in another way."""

    def special() -> nn.Module:
        module = seeded_frozen(SmallResNet, 0)
        with torch.no_grad():
            for weight in module.parameters():
                weight.fill_(value)
        return module

    inputs = MODELS["resnet"][1]
    traced = rt.trace(special(), inputs, freeze=True)
    other = rt.load(frozen("resnet", 1))
    wanted = traced(*inputs), other(*inputs)
    rt.replace_weights(traced, seeded_frozen(SmallResNet, 1))
    rt.replace_weights(other, special())
    assert_same((other(*inputs), traced(*inputs)), wanted)


def test_only_what_depends_on_a_key_is_made(frozen: Callable[[str, int], Path], tmp_path: Path) -> None:
    weights = seeded_frozen(SmallResNet, 1).state_dict()
    some = {key: value for key, value in weights.items() if key.startswith("fc.")}
    torch.save(some, tmp_path / "some.pt")
    plan = reweft.plan(frozen("resnet", 0), tmp_path / "some.pt", allow_missing=True)
    assert plan.ok
    assert len(plan) == 2
    torch.save({**some, "conv1.weight": weights["conv1.weight"]}, tmp_path / "some.pt")
    plan = reweft.plan(frozen("resnet", 0), tmp_path / "some.pt", allow_missing=True)
    assert "bn1.weight" in next(finding.what for finding in plan.findings if finding.blocking)


def test_weights_that_do_not_fit_are_refused(frozen: Callable[[str, int], Path]) -> None:
    model, inputs = rt.load(frozen("resnet", 0)), MODELS["resnet"][1]
    before = model(*inputs)
    weights = seeded_frozen(SmallResNet, 1).state_dict()
    for key, value in [("bn1.weight", torch.ones(17)), ("bn1.bias", torch.zeros(16, dtype=torch.float64))]:
        with pytest.raises(reweft.MismatchError) as error:
            rt.replace_weights(model, {**weights, key: value})
        assert_says(error, key)
    del weights["bn1.running_var"]
    with pytest.raises(reweft.MismatchError) as error:
        rt.replace_weights(model, weights)
    assert_says(error, "bn1.running_var")
    assert_same(model(*inputs), before)


@pytest.mark.parametrize("name", list(BY_TORCH))
def test_the_command_refuses_what_torch_has_to_make(
    name: str, frozen: Callable[[str, int], Path], tmp_path: Path
) -> None:
    done = command("refit", frozen(name, 0), state(name, 1, tmp_path), "-o", tmp_path / "out.pt2")
    assert done.returncode == 2
    assert BY_TORCH[name] in done.stderr
    assert "_frozen_param" in done.stderr
    assert "reweft.torch" in done.stderr
    assert not (tmp_path / "out.pt2").exists()
    assert command("inspect", frozen(name, 0)).stdout.count("folded by torch") >= 1


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BY_TORCH])
def test_the_command_gives_the_same_file_without_torch(
    name: str, frozen: Callable[[str, int], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.pt2"
    done = command("refit", frozen(name, 0), state(name, 1, tmp_path), "-o", out)
    assert done.returncode == 0, done.stderr
    assert rows(out) == rows(frozen(name, 1))


def test_another_build_of_torch_is_refused_where_torch_has_to_make_rows(
    frozen: Callable[[str, int], Path], tmp_path: Path
) -> None:
    def edit(of: dict[str, Any]) -> None:
        of["folded"]["capability"] = "NEON"

    edited = with_manifest(frozen("clip", 0), tmp_path / "edited.pt2", edit)
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(edited, state("clip", 1, tmp_path), out=tmp_path / "out.pt2")
    assert_says(error, "_frozen_param", "NEON", "aten::exp")
    # What IEEE 754 defines is the same everywhere.
    edited = with_manifest(frozen("resnet", 0), tmp_path / "edited.pt2", edit)
    reweft.refit(edited, state("resnet", 1, tmp_path), out=tmp_path / "out.pt2")


def test_an_operator_that_does_more_than_compute_is_not_carried_out(tmp_path: Path) -> None:
    for name in (
        "aten::from_file.default",
        "aten::rand_like.default",
        "aten::fill_.Scalar",
        "os::system",
        "aten::no",
    ):
        assert not replay.is_pure(name), name
        with pytest.raises(reweft.UnsupportedError):
            replay._apply(name, f'[["{tmp_path}/made",true,4]]', 0, [])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    x, before = torch.rand(2, 300), Masked().eval()
    with pytest.raises(reweft.UnsupportedError) as error:
        rt.trace(before, x, freeze=True)
    assert_says(error, "weight", "[300, 300]", "no state_dict has")
    with pytest.warns(UserWarning, match="without freezing"):
        model = rt.trace(before, x, freeze="auto")
    other = Masked().eval()
    rt.replace_weights(model, other)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))


def test_calls_for_other_models_are_for_frozen_ones_too(frozen: Callable[[str, int], Path], tmp_path: Path) -> None:
    kind, inputs = MODELS["depthwise"]
    model, other = rt.load(frozen("depthwise", 0)), seeded_frozen(kind, 1)
    wanted = rt.load(frozen("depthwise", 1))(*inputs)
    before = model(*inputs)
    assert_same(rt.refit_module_weights(model, other, inputs, verify_output=True)(*inputs), wanted)
    assert_same(model(*inputs), before)

    rt.save(model, tmp_path / "program.pt2", inline_weights=False)
    filled = rt.load(tmp_path / "program.pt2", weights=state("depthwise", 1, tmp_path), replicas=2)
    assert_same((filled(*inputs), filled(*inputs)), (wanted, wanted))
    with pytest.raises(reweft.RunError):
        rt.load(tmp_path / "program.pt2")(*inputs)

    doubled = {key: value.double() if value.is_floating_point() else value for key, value in other.state_dict().items()}
    rt.replace_weights(model, doubled, allow_cast=True)
    assert_same(model(*inputs), wanted)


def test_a_frozen_model_takes_any_batch(frozen: Callable[[str, int], Path]) -> None:
    kind, inputs = MODELS["weight-norm"]
    # Its weights cannot be read back, so those that it is tried with are others.
    batched = rt.dynamic_batch(rt.load(frozen("weight-norm", 0)), example_inputs=inputs)
    rt.replace_weights(batched, seeded_frozen(kind, 1))
    wanted = rt.load(frozen("weight-norm", 1))(*inputs)
    assert_same(batched(torch.cat([inputs[0]] * 3)), torch.cat([wanted] * 3))


def test_weights_of_another_frozen_model(frozen: Callable[[str, int], Path]) -> None:
    for name in ("resnet", "vit"):
        inputs = MODELS[name][1]
        model, other = rt.load(frozen(name, 0)), rt.load(frozen(name, 1))
        rt.replace_weights(model, other)
        assert_same(model(*inputs), other(*inputs))
        assert model.weights_version == other.weights_version
    # Where nothing is folded, any program takes them.
    model = rt.trace(seeded_frozen(MODELS["vit"][0], 0), MODELS["vit"][1])
    rt.replace_weights(model, other)
    torch.testing.assert_close(model(*inputs), other(*inputs))


class Scaled(nn.Module):
    """Something with a number for a pass to change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.relu(self.fc(x)) * 3.0
        return out


def constants(graph: torch.fx.Graph) -> list[torch.Tensor]:
    """The tensors of a graph, weights among them."""
    found = [operator.attrgetter(node.target)(graph.owning_module) for node in graph.nodes if node.op == "get_attr"]
    return [value for value in found if isinstance(value, torch.Tensor) and not value.is_mkldnn]


def test_a_value_that_the_compiler_reads_is_noticed() -> None:
    def reads(graph: torch.fx.Graph) -> None:
        constants(graph)[0].reshape(-1)[0].item()

    options = {"post_grad_custom_post_pass": reads, "compare_code": False}
    with pytest.raises(reweft.UnsupportedError) as error:
        rt.trace(Scaled().eval(), torch.rand(2, 8), freeze=True, options=options)
    assert_says(error, "fc.bias", "read its value", "item")


def test_a_value_that_gets_into_the_code_unseen_is_noticed() -> None:
    def hides(graph: torch.fx.Graph) -> None:
        value = ctypes.c_float.from_address(constants(graph)[0].data_ptr()).value
        for node in graph.nodes:
            node.args = tuple(value if isinstance(arg, float) else arg for arg in node.args)

    with pytest.raises(reweft.UnsupportedError) as error:
        rt.trace(Scaled().eval(), torch.rand(2, 8), freeze=True, options={"post_grad_custom_post_pass": hides})
    assert_says(error, "other code")


def test_freeze_is_one_of_three() -> None:
    with pytest.raises(reweft.UsageError) as error:
        rt.trace(Scaled().eval(), torch.rand(2, 8), freeze="yes")  # type: ignore[arg-type]
    assert_says(error, "freeze", "'yes'", "auto")


def test_tied_weights_that_are_not_equal_are_refused(frozen: Callable[[str, int], Path]) -> None:
    model, inputs = rt.load(frozen("gpt-tied", 0)), MODELS["gpt-tied"][1]
    before = model(*inputs)
    weights = dict(seeded_frozen(MODELS["gpt-tied"][0], 1).state_dict())
    weights["head.weight"] = weights["head.weight"] + 1
    with pytest.raises(reweft.MismatchError) as error:
        rt.replace_weights(model, weights)
    assert_says(error, "head.weight", "words.weight")
    assert_same(model(*inputs), before)


def test_a_row_is_explained_as_a_formula(frozen: Callable[[str, int], Path]) -> None:
    package = frozen("resnet", 0)
    row = next(slot["name"] for slot in manifest(package)["slots"] if "bn1.weight" in json.dumps(slot.get("recipe")))
    said = command("explain", package, row).stdout
    assert "1 / sqrt(bn1.running_var + 0.00001)" in said
    assert row in command("explain", package, "bn1.weight").stdout
    done = command("explain", package, "bn1.weigth")
    assert done.returncode == 2
    assert "bn1.weight" in done.stderr


def test_freezing_by_an_option_is_refused() -> None:
    with pytest.raises(reweft.UsageError) as error:
        rt.trace(Masked().eval(), torch.rand(2, 300), options={"freezing": True})
    assert_says(error, "freeze=True")


def test_an_edited_recipe_or_layout_is_an_error(frozen: Callable[[str, int], Path], tmp_path: Path) -> None:
    package = frozen("resnet", 0)

    def first(of: dict[str, Any], op: str) -> dict[str, Any]:
        return next(step for slot in of["slots"] for step in slot.get("recipe", []) if step["op"] == op)

    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda of: first(of, "literal").update(bytes="0000803f"),
        lambda of: first(of, "leaf").update(key="fc.bias"),
        lambda of: first(of, "arithmetic").update(function="add"),
        lambda of: first(of, "pack").update(nbytes=64),
        lambda of: first(of, "pack")["strides"].reverse(),
        lambda of: of["folded"]["originals"][0].update(shape=[1]),
        lambda of: of.pop("folded"),
    ]
    for edit in edits:
        with pytest.raises(reweft.ReweftError):
            reweft.plan(with_manifest(package, tmp_path / "edited.pt2", edit), state("resnet", 1, tmp_path))

    def other_layout(source: bytes) -> bytes:
        return re.sub(rb"(opaque_metadata = \{1L, 0L, 0L, 0L, 4L, 0L, 0L, 0L, )\d+L", rb"\g<1>8L", source)

    edited = with_record(package, tmp_path / "edited.pt2", ".wrapper.cpp", other_layout)
    with pytest.raises(reweft.ReweftError):
        reweft.plan(edited, state("resnet", 1, tmp_path))


@pytest.mark.parametrize("setting", [{"OMP_NUM_THREADS": "1"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}])
def test_other_threads_and_instructions_choose_other_layouts(setting: dict[str, str], tmp_path: Path) -> None:
    """A package that is made under a setting is refitted here, where oneDNN would choose otherwise."""
    code = """
import sys
import reweft.torch as rt
from frozen_models import MODELS, seeded_frozen
kind, inputs = MODELS["resnet"]
for seed in (0, 1):
    model = rt.trace(seeded_frozen(kind, seed), inputs, freeze=True, options={"compare_code": False})
    rt.save(model, f"{sys.argv[1]}/{seed}.pt2")
"""
    done = child(code, tmp_path, env=setting, timeout=600)
    assert done.returncode == 0, done.stderr
    reweft.refit(tmp_path / "0.pt2", state("resnet", 1, tmp_path), out=tmp_path / "there.pt2")
    assert rows(tmp_path / "there.pt2") == rows(tmp_path / "1.pt2")


def test_a_function_mode_and_a_pass_of_the_user_see_what_they_would() -> None:
    seen: list[str] = []

    class Theirs(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    kind, inputs = MODELS["resnet"]
    graphs: list[torch.fx.Graph] = []
    options = {"post_grad_custom_post_pass": graphs.append, "compare_code": False}
    with Theirs():
        model = rt.trace(seeded_frozen(kind, 0), inputs, freeze=True, options=options)
    assert graphs
    assert any("aten.mul" in name for name in seen)
    rt.replace_weights(model, seeded_frozen(kind, 1))


@pytest.mark.parametrize("name", ["resnet", "vit", "bert-bf16", "gpt-tied", "lstm", "unet"])
def test_what_was_only_moved_can_be_read_back(name: str, frozen: Callable[[str, int], Path], tmp_path: Path) -> None:
    wanted = seeded_frozen(MODELS[name][0], 1).state_dict()
    report = reweft.extract(frozen(name, 1), tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    live = rt.load(frozen(name, 1)).state_dict()
    assert back.keys() == live.keys()
    for key, value in back.items():
        assert torch.equal(value, wanted[key]), key
        assert torch.equal(live[key], wanted[key]), key
    # What the program reads; of its table of places bfloat16 keeps the rows that it needs.
    lost = {key for key in wanted.keys() - back.keys() if not key.endswith("num_batches_tracked")}
    if name == "resnet":
        assert set(back) == {"fc.weight", "fc.bias"}
    else:
        assert lost == ({"places.weight"} if name == "bert-bf16" else set())
    assert all(any(key in notice for notice in report.notices) for key in lost)


def test_frozen_by_somebody_else_is_refused_as_before(tmp_path: Path) -> None:
    kind, inputs = MODELS["resnet"]
    with torch.no_grad():
        program = torch.export.export(seeded_frozen(kind, 0), inputs)
        settings = {"freezing": True, "always_keep_tensor_constants": True, "joint_graph_constant_folding": False}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "theirs.pt2"), inductor_configs=settings
        )
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(tmp_path / "theirs.pt2", state("resnet", 1, tmp_path), out=tmp_path / "out.pt2")
    assert_says(error, "freezing=True")
