"""`replace_weights`: every source gives the same weights, outputs follow them exactly, and nothing leaks in later."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import reweft
import reweft.torch as rt
from models import Counter, seeded
from support import assert_same, assert_says, differs, save, save_state

if TYPE_CHECKING:
    from support import Package

# Largest difference from eager, absolute. 0: the same library kernels on the same values. Otherwise:
TOLERANCES = {
    "digits": 2e-5,  # BatchNorm is one kernel in eager, and fused with exp and mean in another order of roundings here
    "tied": 0.0,
    "mixed": 0.0,
    "half_width": 0.0,
    "views": 0.0,
    "recurrent": 2e-6,  # tanh and sigmoid are vectorised by another library
}


@pytest.fixture(params=TOLERANCES)
def package(request: pytest.FixtureRequest) -> Package:
    """Each package whose outputs depend on weights and inputs alone."""
    found: Package = request.getfixturevalue(request.param)
    return found


def largest_difference(left: Any, right: Any) -> float:
    pairs = zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True)
    return max(float((one.double() - other.double()).abs().max()) for one, other in pairs if one is not None)


def test_outputs_equal_eager_before_and_after(package: Package) -> None:
    tolerance = TOLERANCES[package.path.stem.replace("halfwidth", "half_width")]
    model = package.load()
    for seed in (0, 1, 2):
        if seed:
            rt.replace_weights(model, package.module(seed))
        outputs, wanted = model(*package.inputs), package.eager(seed)
        assert pytree.tree_structure(outputs) == pytree.tree_structure(wanted)
        assert largest_difference(outputs, wanted) <= tolerance
    assert largest_difference(package.eager(0), package.eager(1)) > 1e-3


def test_every_source_gives_the_same_outputs(package: Package, tmp_path: Path) -> None:
    module = package.module(1)
    path = save_state(module, tmp_path / "b.pt")
    reweft.convert(path, tmp_path / "b.safetensors", shared="duplicate")
    sources: list[Any] = [
        module,
        module.state_dict(),
        dict(module.state_dict(keep_vars=True)),
        path,
        str(path),
        tmp_path / "b.safetensors",
        reweft.open(path),
        reweft.open(path, mmap=True),
    ]
    model, refitted = package.load(), tmp_path / "b.pt2"
    reweft.refit(package.path, rt.checkpoint_of(rt.load(package.path).state_dict()), out=refitted)
    for source in sources:
        model = package.load()
        rt.replace_weights(model, source)
        if source is module:
            # A module also has what is in no state_dict; the others must keep that as it is.
            extra = {key: value for key, value in package.load().state_dict().items() if key not in module.state_dict()}
            rt.replace_weights(model, extra, allow_missing=True)
            wanted = model(*package.inputs)
        assert_same(model(*package.inputs), wanted)


def test_a_to_b_to_a_restores_every_bit(package: Package, tmp_path: Path) -> None:
    model = package.load()
    before, state = model(*package.inputs), model.state_dict()
    rt.replace_weights(model, save_state(package.module(1), tmp_path / "b.pt"))
    assert differs(model(*package.inputs), before)
    rt.replace_weights(model, package.module(0))
    assert_same(model(*package.inputs), before)
    assert_same(model.state_dict(), state)


def test_a_mapped_file_is_not_copied(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    reweft.convert(digits_b, tmp_path / "b.safetensors")
    total = sum(value.numel() * 4 for key, value in torch.load(digits_b).items() if "num_batches" not in key)
    for path in (digits_b, tmp_path / "b.safetensors", reweft.open(digits_b, mmap=True)):
        report = rt.replace_weights(digits.load(), path)
        assert (report.bytes_copied, report.nbytes) == (0, total)
    report = rt.replace_weights(digits.load(), reweft.open(digits_b))
    assert (report.bytes_copied, report.nbytes) == (total, total)


def test_tensors_in_memory_are_copied(digits: Package) -> None:
    model, source = digits.load(), digits.module(1)
    report = rt.replace_weights(model, source)
    assert report.bytes_copied == report.nbytes > 0
    before, state = model(*digits.inputs), model.state_dict()
    with torch.no_grad():
        for value in source.state_dict().values():
            value.fill_(0)
    assert_same(model(*digits.inputs), before)
    assert_same(model.state_dict(), state)


def test_standby_copies_into_the_memory_of_the_weights_before_the_last(package: Package) -> None:
    model, plain = rt.load(package.path, standby=True), package.load()
    for seed in (1, 2, 0, 1, 2):
        state = package.module(seed).state_dict()
        report = rt.replace_weights(model, state, allow_missing=True)
        rt.replace_weights(plain, state, allow_missing=True)
        assert report.bytes_copied == report.nbytes
        assert_same(model(*package.inputs), plain(*package.inputs))
        assert model.weights_version == plain.weights_version
        for value in state.values():
            value.zero_()
        assert_same(model(*package.inputs), plain(*package.inputs))


class Wide(nn.Module):
    """32 MB of weights in a program of one multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4096, 2048))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_replaced_weights_are_released_or_kept_once(tmp_path: Path) -> None:
    """Anonymous memory in sets of weights: one that serves, and with `standby` one for the next copy."""
    path = tmp_path / "wide.pt2"
    rt.save(rt.trace(seeded(Wide, 0), torch.rand(1, 4096)), path)
    state = seeded(Wide, 1).state_dict()
    nbytes = state["weight"].nbytes
    for standby, wanted in ((False, 1), (True, 2)):
        before = anonymous_nbytes()
        model = rt.load(path, standby=standby)
        for _ in range(5):
            rt.replace_weights(model, state)
        assert round((anonymous_nbytes() - before) / nbytes) == wanted
        del model


def anonymous_nbytes() -> int:
    """What the process has in memory that is in no file."""
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Anonymous:")))


def test_a_file_may_go_once_it_serves(digits: Package, digits_b: Path) -> None:
    model = digits.load()
    rt.replace_weights(model, digits_b)
    before = model(*digits.inputs)
    save_state(digits.module(2), digits_b.with_name("c.pt")).replace(digits_b)
    assert_same(model(*digits.inputs), before)
    digits_b.unlink()
    assert_same(model(*digits.inputs), before)


def test_package_file_may_go_once_it_is_loaded(digits: Package, tmp_path: Path) -> None:
    own = tmp_path / "own.pt2"
    own.write_bytes(digits.path.read_bytes())
    model = rt.load(own)
    own.unlink()
    before = model(*digits.inputs)
    rt.replace_weights(model, digits.module(1))
    assert differs(model(*digits.inputs), before)
    rt.save(model, own)
    assert_same(rt.load(own)(*digits.inputs), model(*digits.inputs))


def test_state_dict_gives_the_weights_in_use(package: Package) -> None:
    model, module = package.load(), package.module(1)
    rt.replace_weights(model, module)
    state, wanted = model.state_dict(), module.state_dict()
    for key, value in state.items():
        if key in wanted:
            assert_same(value, wanted[key].contiguous())
    for value in state.values():
        value.zero_()
    assert set(wanted) - set(state) <= {"bn1.num_batches_tracked", "bn2.num_batches_tracked", "nothing"}
    assert model.state_dict().keys() == state.keys()
    assert any(differs(value, state[key]) for key, value in model.state_dict().items())


def test_state_of_one_model_moves_to_another(package: Package) -> None:
    one, other = package.load(), package.load()
    rt.replace_weights(one, package.module(1))
    rt.replace_weights(other, one.state_dict())
    assert_same(one(*package.inputs), other(*package.inputs))


def test_models_of_one_package_have_weights_of_their_own(digits: Package) -> None:
    one, other = digits.load(), digits.load()
    before = other(*digits.inputs)
    rt.replace_weights(one, digits.module(1))
    assert_same(other(*digits.inputs), before)


def test_views_of_a_larger_storage(digits: Package) -> None:
    """`load_constants` copies the whole storage of a view, and more than the slot holds."""
    model, wanted = digits.load(), digits.load()
    state = digits.module(1).state_dict()
    rt.replace_weights(wanted, state)
    flat = torch.cat([torch.full((7,), 9.0), *(value.reshape(-1).float() for value in state.values())])
    views, at = {}, 7
    for key, value in state.items():
        views[key] = flat[at : at + value.numel()].view(value.shape)
        at += value.numel()
    del views["bn1.num_batches_tracked"], views["bn2.num_batches_tracked"]
    views["fc.weight"] = state["fc.weight"].t().contiguous().t()
    views["conv2.weight"] = state["conv2.weight"].to(memory_format=torch.channels_last)
    views["bn1.bias"] = torch.stack([state["bn1.bias"]] * 2, dim=1)[:, 0]
    rt.replace_weights(model, views)
    assert_same(model(*digits.inputs), wanted(*digits.inputs))


def test_views_of_a_larger_storage_from_a_file(digits: Package, tmp_path: Path) -> None:
    state = digits.module(1).state_dict()
    model, wanted = digits.load(), digits.load()
    rt.replace_weights(wanted, state)
    rt.replace_weights(wanted, {"fc.bias": state["fc.weight"][1, :4].clone()}, allow_missing=True)
    state["fc.bias"] = state["fc.weight"][1, :4]
    report = rt.replace_weights(model, save(state, tmp_path / "x.pt"))
    assert report.bytes_copied == 0
    assert_same(model(*digits.inputs), wanted(*digits.inputs))


class TestBeyondTheStateDict:
    """Non-persistent buffers and tensor attributes are slots, but no state_dict has them."""

    def test_module_brings_them(self, mixed: Package) -> None:
        model = mixed.load()
        report = rt.replace_weights(model, mixed.module(1))
        assert report.kept == ()
        assert largest_difference(model(*mixed.inputs), mixed.eager(1)) == 0

    def test_state_dict_leaves_them_with_a_notice(self, mixed: Package) -> None:
        model, old, new = mixed.load(), mixed.eager(0), mixed.eager(1)
        report = rt.replace_weights(model, mixed.module(1).state_dict())
        assert set(report.kept) == {"window", "offset"}
        for name in report.kept:
            assert any(name in notice for notice in report.notices)
        outputs = model(*mixed.inputs)
        assert_same(outputs["list"], old["list"])
        assert_same(outputs["buffer"], old["buffer"])
        assert_same(outputs["phase"], new["phase"])
        assert_same(outputs["pair"][0], new["pair"][0])

    def test_keys_name_them_by_their_path(self, mixed: Package, tmp_path: Path) -> None:
        module = mixed.module(1)
        state = {**module.state_dict(), "window": module.window, "offset": module.offset}
        model = mixed.load()
        rt.replace_weights(model, save(state, tmp_path / "x.pt"))
        assert largest_difference(model(*mixed.inputs), mixed.eager(1)) == 0

    def test_an_output_that_is_a_weight_is_the_callers_own(self, mixed: Package) -> None:
        model = mixed.load()
        kept = model(*mixed.inputs)["buffer"]
        wanted = kept.clone()
        model(*mixed.inputs)["buffer"].fill_(9)
        assert torch.equal(model(*mixed.inputs)["buffer"], wanted)
        rt.replace_weights(model, mixed.module(1))
        assert torch.equal(kept, wanted)


class TestBuffersThatTheProgramWrites:
    """A KV cache in small."""

    def test_state_continues_over_calls(self, counter: Package) -> None:
        model, module = counter.load(), counter.module(0)
        with torch.no_grad():
            for _ in range(3):
                assert_same(model(*counter.inputs), module(*counter.inputs))

    def test_replace_sets_the_state(self, counter: Package) -> None:
        model = counter.load()
        model(*counter.inputs)
        module = seeded(Counter, 1)
        module.total.copy_(torch.arange(4.0))
        module.calls.fill_(40)
        report = rt.replace_weights(model, module.state_dict())
        assert report.kept == ()
        with torch.no_grad():
            for _ in range(2):
                assert_same(model(*counter.inputs), module(*counter.inputs))

    def test_file_is_copied_for_them_and_stays_as_it_is(self, counter: Package, tmp_path: Path) -> None:
        path = save_state(counter.module(1), tmp_path / "b.pt")
        before, model = path.read_bytes(), counter.load()
        assert rt.replace_weights(model, path).bytes_copied == 4 * 4 + 8
        model(*counter.inputs)
        assert path.read_bytes() == before
        rt.replace_weights(model, path)
        assert int(model(*counter.inputs)[1]) == 1

    def test_state_continues_over_a_replacement_of_the_weights_alone(self, counter: Package) -> None:
        model, module = counter.load(), seeded(Counter, 1)
        model(*counter.inputs)
        model(*counter.inputs)
        report = rt.replace_weights(model, {"weight": module.weight}, allow_missing=True)
        assert set(report.kept) == {"total", "calls"}
        product, calls = model(*counter.inputs)
        assert int(calls) == 3
        assert torch.equal(product, 3 * counter.inputs[0] * module.weight.detach())

    def test_saved_model_goes_on_from_its_state(self, counter: Package, tmp_path: Path) -> None:
        model = counter.load()
        model(*counter.inputs)
        state = model.state_dict()
        assert int(state["calls"]) == 1
        rt.save(model, tmp_path / "later.pt2")
        later = rt.load(tmp_path / "later.pt2")
        assert_same(later(*counter.inputs), model(*counter.inputs))
        assert int(state["calls"]) == 1

    def test_a_second_model_starts_afresh(self, counter: Package) -> None:
        counter.load()(*counter.inputs)
        assert int(counter.load()(*counter.inputs)[1]) == 1

    def test_replicas_would_share_them(self, counter: Package) -> None:
        with pytest.raises(reweft.UsageError, match="replica"):
            counter.load(replicas=2)


class TestSourcesThatDoNotFit:
    """Refused before anything is bound; `tests/refit/test_mismatch.py` has the cases of files."""

    @pytest.fixture
    def model(self, digits: Package) -> rt.CompiledModule:
        return digits.load()

    @pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(), nn.Conv2d(1, 1, 1)], ids=repr)
    def test_module_of_another_architecture(self, module: nn.Module, model: rt.CompiledModule) -> None:
        with pytest.raises(reweft.MismatchError):
            rt.replace_weights(model, module)

    @pytest.mark.parametrize("weights", [None, 3, [torch.ones(1)], torch.ones(1)])
    def test_not_weights(self, weights: Any, model: rt.CompiledModule) -> None:
        with pytest.raises(reweft.UsageError):
            rt.replace_weights(model, weights)

    @pytest.mark.parametrize(
        "value", [None, 3, torch.empty(4, device="meta"), torch.eye(4).to_sparse(), [1.0] * 4], ids=str
    )
    def test_value_that_is_no_plain_tensor(self, value: Any, model: rt.CompiledModule, digits: Package) -> None:
        with pytest.raises(reweft.UnsupportedError) as error:
            rt.replace_weights(model, {**digits.module(1).state_dict(), "fc.bias": value})
        assert_says(error, "fc.bias")

    def test_module_on_meta(self, model: rt.CompiledModule, digits: Package) -> None:
        with pytest.raises(reweft.UnsupportedError, match="meta"):
            rt.replace_weights(model, digits.module(1).to("meta"))

    def test_top_level_key_is_for_files(self, model: rt.CompiledModule, digits: Package) -> None:
        with pytest.raises(reweft.UsageError):
            rt.replace_weights(model, digits.module(1), top_level_key="model")

    def test_key_map_applies_to_tensors_in_memory(self, model: rt.CompiledModule, digits: Package) -> None:
        state = {f"module.{key}": value for key, value in digits.module(1).state_dict().items()}
        rt.replace_weights(model, state, keys=reweft.KeyMap([(r"^module\.", "")]))
        other = digits.load()
        rt.replace_weights(other, digits.module(1))
        assert_same(model(*digits.inputs), other(*digits.inputs))
