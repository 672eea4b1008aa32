"""`compile`: a module that follows another one, and a cache that refits instead of compiling."""

from __future__ import annotations

import copy
import logging
import operator
import os
import pickle
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as fn
from torch.utils import _pytree as pytree

import reweft.torch as rt
from reweft.errors import FormatError, MismatchError, UnsupportedError, UsageError
from reweft.torch.programs import NoKeyError, key_of, number_weights
from reweft.torch.signature import flatten
from reweft.torch.tracing import compiler_settings, exported

if TYPE_CHECKING:
    from pathlib import Path

LIVE, NEEDS_REFIT, NEEDS_RECOMPILE = rt.WeightsState.LIVE, rt.WeightsState.NEEDS_REFIT, rt.WeightsState.NEEDS_RECOMPILE


class Net(nn.Module):
    """Everything that has to be followed, in little."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(6)
        self.scale = torch.tensor(2.0)
        self.eps, self.steps = 0.5, [1.0, 2.0]
        self.config = SimpleNamespace(inner=SimpleNamespace(power=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = fn.relu(self.norm(self.first(x))) * self.scale + self.eps
        out: torch.Tensor = self.second(y) * self.steps[-1] ** self.config.inner.power
        return out


class Counting(nn.Module):
    """Writes to a buffer."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        out: torch.Tensor = self.fc(x) + self.calls
        return out


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> rt.ProgramCache:
    """The programs of these tests: each is compiled by whoever needs it first."""
    return rt.ProgramCache(tmp_path_factory.mktemp("programs"))


def same(compiled: rt.LiveModule, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """One call gives what the module gives; which is run on a copy, as it may write to buffers."""
    with torch.no_grad():
        wanted = copy.deepcopy(module)(*args, **kwargs)
        found = compiled(*args, **kwargs)
    leaves, spec = pytree.tree_flatten(wanted)
    other, other_spec = pytree.tree_flatten(found)
    assert spec == other_spec
    for one, two in zip(other, leaves, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def lines(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reweft.torch")


def test_steps_of_an_optimizer_are_seen_without_a_refit(
    cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture
) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    assert compiled.weights_state is NEEDS_RECOMPILE
    same(compiled, module, X)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    for _ in range(3):
        module(X).square().sum().backward()
        before = compiled(X)
        optimizer.step()
        assert compiled.weights_state is LIVE
        same(compiled, module, X)
        assert not torch.equal(before, compiled(X))
    with torch.no_grad():
        module.second.weight.copy_(torch.ones(4, 6))
        nn.init.normal_(module.first.weight)
    same(compiled, module, X)
    module.load_state_dict(make(7).state_dict())
    same(compiled, module, X)
    assert not lines(caplog, "refitted")
    # The same storages, and no copies of them.
    assert module.first.weight.data_ptr() == compiled.first.weight.data_ptr()


@pytest.mark.parametrize(
    "replace",
    [
        lambda net: setattr(net.first, "weight", nn.Parameter(torch.randn(6, 4))),
        lambda net: setattr(net.second.bias, "data", torch.randn(4)),
        lambda net: net.load_state_dict(make(3).state_dict(), assign=True),
        lambda net: setattr(net, "scale", torch.tensor(-1.5)),
        lambda net: net.norm.register_buffer("running_mean", torch.randn(6)),
    ],
    ids=["attribute", "data", "assign", "tensor attribute", "buffer"],
)
def test_replaced_tensors_are_found_at_the_next_call(
    cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture, replace: Any
) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    before = compiled(X)
    replace(module)
    assert compiled.weights_state is NEEDS_REFIT
    same(compiled, module, X)
    assert not torch.equal(before, compiled(X))
    assert compiled.weights_state is LIVE
    assert len(lines(caplog, "refitted")) == 1
    assert "is another tensor" in lines(caplog, "refitted")[0]


def test_writing_through_the_compiled_module_is_writing_to_the_module(cache: rt.ProgramCache) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    compiled(X)
    weight = nn.Parameter(torch.randn(6, 4))
    compiled.first.weight = weight
    assert module.first.weight is weight
    same(compiled, module, X)
    compiled.note = 0.5  # type: ignore[assignment]
    assert module.note == 0.5
    del compiled.note
    assert list(compiled.state_dict()) == list(module.state_dict())
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert compiled.to(torch.float32) is compiled
    assert compiled.eval() is compiled
    assert not hasattr(module, "note")


def test_the_same_value_written_again_is_no_refit(cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    compiled(X)
    caplog.clear()
    module.first.weight = module.first.weight
    module.eps = float("0.5")
    module.steps = [1.0, 2.0]
    assert compiled.weights_state is LIVE
    same(compiled, module, X)
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda net: setattr(net, "eps", 0.25), "the module.eps is 0.25, was 0.5"),
        (lambda net: net.steps.append(3.0), "steps"),
        (lambda net: setattr(net.config.inner, "power", 3), "config"),
        (lambda net: setattr(net, "first", nn.Linear(4, 6, bias=False).eval()), "bias"),
        (lambda net: net.norm.train(), "norm.training is True"),
        (lambda net: net.second.register_forward_hook(lambda _module, _args, out: out + 1), "_forward_hooks"),
    ],
    ids=["attribute", "list", "config", "part", "mode of a part", "hook"],
)
@pytest.mark.filterwarnings("ignore:.*has forward hooks:UserWarning")
def test_what_the_code_depends_on_is_compiled_again(
    cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture, change: Any, why: str
) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    compiled(X)
    change(module)
    assert compiled.weights_state is NEEDS_RECOMPILE
    same(compiled, module, X)
    assert why in lines(caplog, "needs recompile")[0]
    assert compiled.weights_state is LIVE


def test_a_replaced_part_of_another_shape_is_compiled(cache: rt.ProgramCache) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    compiled(X)
    module.second = nn.Linear(6, 2)
    assert compiled.weights_state is NEEDS_RECOMPILE
    same(compiled, module, X)
    assert compiled(X).shape == (3, 2)


def test_a_second_model_of_the_architecture_compiles_nothing(
    cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture
) -> None:
    class Renamed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.erste = self.first
            del self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = fn.relu(self.norm(self.erste(x))) * self.scale + self.eps
            out: torch.Tensor = self.second(y) * self.steps[-1] ** self.config.inner.power
            return out

    rt.compile(make(), cache_dir=cache)(X)
    caplog.clear()
    module = make(5)
    same(rt.compile(module, cache_dir=cache), module, X)
    assert len(lines(caplog, "taken from the cache")) == 1
    assert not lines(caplog, "compiled in")
    # Its weights have other names and are registered in another order.
    renamed = Renamed().eval()
    same(rt.compile(renamed, cache_dir=cache), renamed, X)
    assert len(lines(caplog, "taken from the cache")) == 2
    assert not lines(caplog, "compiled in")


def test_another_process_compiles_nothing(cache: rt.ProgramCache) -> None:
    module = make()
    rt.compile(module, cache_dir=cache)(X)
    done = run_process(cache.folder, "0")
    assert "taken from the cache" in done.stderr
    assert "compiled in" not in done.stderr
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), module(X), rtol=1e-5, atol=1e-5)  # noqa: S307  (a list)


PROCESS = """
import logging, sys, torch
sys.path[:0] = {path!r}
logging.basicConfig(level=logging.INFO)
import reweft.torch as rt
from live.test_compile import X, make
compiled = rt.compile(make({seed}), cache_dir={folder!r}, options={options!r})
with torch.no_grad():
    print(compiled(X).tolist())
"""


def start_process(folder: Path, seed: str, options: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    code = PROCESS.format(path=sys.path, seed=seed, folder=str(folder), options=options or {})
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_process(folder: Path, seed: str) -> subprocess.CompletedProcess[str]:
    process = start_process(folder, seed)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, 0, out, err)


def test_two_processes_at_once_compile_once(tmp_path: Path) -> None:
    both = [start_process(tmp_path, seed) for seed in ("1", "2")]
    ended = [process.communicate(timeout=600) for process in both]
    logs = "".join(err for _out, err in ended)
    assert [process.returncode for process in both] == [0, 0], logs
    assert logs.count("compiled in") == 1, logs
    assert logs.count("taken from the cache") == 1
    for (out, _err), seed in zip(ended, (1, 2), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(eval(out)), make(seed)(X), rtol=1e-5, atol=1e-5)  # noqa: S307


def key(
    module: nn.Module, *args: Any, options: dict[str, Any] | None = None, dynamic_shapes: Any = None, **kwargs: Any
) -> str:
    with torch.no_grad():
        program = exported(module.eval(), args, kwargs, dynamic_shapes)
    leaves = flatten(program.call_spec.in_spec, args, kwargs)
    number_weights(program)
    return key_of(program, leaves, compiler_settings(options or {}, None))


class Call(nn.Module):
    """One function of its input, which is what differs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.function(self.fc(x))
        return out


def test_a_program_exported_twice_has_one_key() -> None:
    assert key(make(0), X) == key(make(1), X)
    options = {"max_autotune": False, "epilogue_fusion": True}
    assert key(make(), X, options=options) == key(make(), X, options=dict(reversed(options.items())))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x.softmax(0), lambda x: x.softmax(1)),
        (lambda x: x + 1, lambda x: x + 1.0),
        (lambda x: x * 0.1, lambda x: x * 0.1000000001),
        (lambda x: x.mul(0.0), lambda x: x.mul(-0.0)),
        (lambda x: x.sum(-1, keepdim=True).expand(3, 4), lambda x: x.mean(-1, keepdim=True).expand(3, 4)),
        (lambda x: fn.pad(x, (1, 0)), lambda x: fn.pad(x, (0, 1))),
        (lambda x: x.to(torch.float64), lambda x: x.to(torch.float16)),
        (lambda x: x.clamp(min=0), lambda x: x.clamp(max=0)),
        (lambda x: x - x.T @ x[:, :1].T.T[:4] if False else x - 1, lambda x: 1 - x),
    ],
)
def test_graphs_that_differ_in_arguments_alone_have_two_keys(one: Any, other: Any) -> None:
    assert key(Call(one), X) != key(Call(other), X)


def test_what_a_program_depends_on_is_in_its_key() -> None:
    base = key(make(), X)
    assert key(make(), X[:2]) != base
    assert key(make().double(), X.double()) != base
    assert key(make(), X, options={"max_autotune": True}) != base
    assert key(make(), X.T.contiguous().T) != base
    sizes = {"x": {0: torch.export.Dim("n", min=2, max=9)}}
    dynamic = key(make(), X, dynamic_shapes=sizes)
    assert dynamic != base
    assert dynamic == key(make(1), X, dynamic_shapes={"x": {0: torch.export.Dim("other", min=2, max=9)}})
    assert dynamic != key(make(), X, dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=8)}})


def test_ties_are_in_the_key() -> None:
    class Two(nn.Module):
        def __init__(self, *, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(self.a(x))
            return out

    assert key(Two(tied=True), X) != key(Two(tied=False), X)


def test_a_pass_of_the_users_is_never_taken_for_another() -> None:
    config: Any = torch._inductor.config
    passed = config.patch(post_grad_custom_post_pass=lambda graph: graph)
    with passed, pytest.raises(NoKeyError, match="post_grad_custom_post_pass"):
        key(make(), X)
    key(make(), X)


def test_a_tie_that_is_undone_is_compiled_again(cache: rt.ProgramCache) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(self.a(x))
            return out

    module = Tied().eval()
    compiled = rt.compile(module, cache_dir=cache)
    same(compiled, module, X)
    weight = nn.Parameter(torch.randn(4, 4))
    module.a.weight = module.b.weight = weight
    assert compiled.weights_state is NEEDS_REFIT
    same(compiled, module, X)
    module.b.weight = nn.Parameter(torch.randn(4, 4))
    assert compiled.weights_state is NEEDS_RECOMPILE
    same(compiled, module, X)


def test_buffers_that_the_program_writes_to_are_the_modules(cache: rt.ProgramCache) -> None:
    module = Counting().eval()
    compiled = rt.compile(module, cache_dir=cache)
    x = torch.ones(2, 3)
    for count in range(1, 4):
        same(compiled, module, x)
        assert module.calls.item() == count
    with torch.no_grad():
        module.calls.zero_()
    same(compiled, module, x)
    assert module.calls.item() == 1
    module.calls = torch.full((1,), 10.0)
    same(compiled, module, x)
    assert module.calls.item() == 11


class Structured(nn.Module):
    """Arguments and results in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, double: bool = False, *, more: dict[str, Any] | None = None) -> dict[str, Any]:  # noqa: FBT001, FBT002
        y = self.fc(x) * (2 if double else 1)
        if more is not None:
            y = y + more["a"] + more["inner"][0]
        return {"y": y, "both": (x, [y + 1])}


def test_every_kind_of_arguments_has_its_program_and_all_share_the_weights(cache: rt.ProgramCache) -> None:
    module = Structured().eval()
    compiled = rt.compile(module, cache_dir=cache)
    more = {"a": torch.ones(3, 4), "inner": [torch.ones(4)]}

    def all_same() -> None:
        same(compiled, module, X)
        same(compiled, module, X, double=True)
        same(compiled, module, X, more=more)
        same(compiled, module, X[:2])

    all_same()
    with torch.no_grad():
        module.fc.weight.add_(1)
    all_same()
    module.fc.bias = nn.Parameter(torch.randn(4))
    all_same()
    assert compiled.weights_state is LIVE


def test_new_inputs_are_refused_if_that_was_asked_for(cache: rt.ProgramCache) -> None:
    compiled = rt.compile(make(), cache_dir=cache, new_inputs="refuse")
    compiled(X)
    with pytest.raises(MismatchError, match=r"Net was compiled for other inputs: .*\[2, 4\].*\[3, 4\]"):
        compiled(X[:2])
    with pytest.raises(UsageError, match="new_inputs"):
        rt.compile(make(), new_inputs="never")  # type: ignore[arg-type]


def test_sizes_that_vary_take_one_program(cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture) -> None:
    module = make()
    sizes = {"x": {0: torch.export.Dim("n", min=2, max=8)}}
    compiled = rt.compile(module, cache_dir=cache, dynamic_shapes=sizes)
    for rows in (3, 2, 8):
        same(compiled, module, torch.randn(rows, 4))
    assert len(lines(caplog, "program ")) == 1
    # Outside of the range a program of its own is made, and not a wrong call.
    same(compiled, module, torch.randn(9, 4))
    assert len(lines(caplog, "program ")) == 2


def test_training_mode_autocast_and_gradients_run_the_module(cache: rt.ProgramCache) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    compiled(X)
    compiled.train()
    with pytest.warns(UserWarning, match="Net is run uncompiled: it is in training mode"):
        assert compiled(X).requires_grad
    compiled.eval()
    same(compiled, module, X)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        assert compiled(X).dtype == torch.bfloat16
    same(compiled, module, X)
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="an input requires a gradient"):
        compiled(x).sum().backward()
    assert x.grad is not None


def test_hooks_are_compiled_in_and_said_to_be(cache: rt.ProgramCache) -> None:
    module = make()
    module.first.register_forward_hook(lambda _module, _args, out: out * 2)
    compiled = rt.compile(module, cache_dir=cache)
    with pytest.warns(UserWarning, match="Net.first has forward hooks"):
        compiled(X)
    same(compiled, module, X)


def test_a_damaged_program_is_compiled_again(tmp_path: Path) -> None:
    module = make()
    rt.compile(module, cache_dir=tmp_path)(X)
    (path,) = tmp_path.glob("*.pt2")
    whole = path.read_bytes()
    other = tmp_path / ("0" * 64 + ".pt2")
    damaged = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "changed in the library": whole.replace(b"\x7fELF", b"\x7fELG", 1),
    }
    for how, content in damaged.items():
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="a program of the cache is not used"):
            same(rt.compile(module, cache_dir=tmp_path), module, X)
        assert path.stat().st_size > len(whole) // 2, how
    # A program under the key of another one.
    rt.compile(nn.Linear(4, 4).eval(), cache_dir=tmp_path)(X)
    (linear,) = (found for found in tmp_path.glob("*.pt2") if found != path)
    linear.rename(other)
    other.replace(path)
    with pytest.warns(UserWarning, match="it is another program"):
        same(rt.compile(module, cache_dir=tmp_path), module, X)


def test_what_was_used_longest_ago_is_removed_first(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.write_bytes(bytes(100))
    cache = rt.ProgramCache(tmp_path / "programs", max_nbytes=250)
    for number in range(2):
        assert cache.put(f"{number}", package) is not None
        os.utime(cache.folder / f"{number}.pt2", (number, number))
    assert cache.get("0") is not None
    cache.put("2", package)
    assert {path.stem for path in cache.list()} == {"0", "2"}
    assert cache.get("1") is None
    package.write_bytes(bytes(300))
    assert cache.put("3", package) is None
    cache.clear()
    assert cache.list() == []


def test_a_folder_of_others_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    package = tmp_path / "package"
    package.write_bytes(b"x")
    cache = rt.ProgramCache(tmp_path)
    with pytest.warns(UserWarning, match="can be written by others"):
        assert cache.put("0", package) is None
    (tmp_path / "0.pt2").write_bytes(b"x")
    with pytest.warns(UserWarning, match="can be written by others"):
        assert cache.get("0") is None


def test_a_cache_of_ones_own_is_hit_exactly_once_a_program(cache: rt.ProgramCache) -> None:
    class Watched(rt.ProgramCache):
        hits: list[str]

        def get(self, key: str) -> Path | None:
            found = super().get(key)
            if found is not None:
                self.hits.append(key)
            return found

    rt.compile(make(), cache_dir=cache)(X)
    watched = Watched(cache.folder)
    watched.hits = []
    compiled = rt.compile(make(), cache_dir=watched)
    for _ in range(3):
        compiled(X)
    assert len(watched.hits) == 1


def test_weights_that_cannot_be_followed_are_refused_by_name(cache: rt.ProgramCache) -> None:
    module = make()
    compiled = rt.compile(module, cache_dir=cache)
    compiled(X)
    odd = torch.empty(6 * 4 * 4 + 1, dtype=torch.uint8)[1:].view(torch.uint8)
    crooked = torch.frombuffer(bytearray(6 * 4 * 4 + 1), dtype=torch.float32, offset=1, count=24).reshape(6, 4)
    assert odd.data_ptr() % 4
    module.first.weight = nn.Parameter(crooked)
    with pytest.raises(UnsupportedError, match=r"first\.weight"):
        compiled(X)
    module.first.weight = nn.Parameter(crooked.clone())
    same(compiled, module, X)


def test_lazily_conjugated_weights_are_refused_by_name(cache: rt.ProgramCache) -> None:
    # Their values are not their bytes: a program would compute with a copy, which follows nothing.
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = torch.tensor([1 + 2j, 3 - 1j]).conj()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.turn

    module, x = Turned().eval(), torch.ones(2, dtype=torch.complex64)
    compiled = rt.compile(module, cache_dir=cache)
    with pytest.raises(UnsupportedError, match=r"cannot be followed where they are: turn"):
        compiled(x)
    module.turn = module.turn.resolve_conj()
    same(compiled, module, x)


def test_weights_outside_the_state_dict_alone(cache: rt.ProgramCache) -> None:
    class Rotary(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.register_buffer("angles", torch.rand(4), persistent=False)
            self.scale = torch.rand(4)
            self.angles: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.angles.cos() + self.scale

    before = len(cache.list())
    for seed in range(2):
        module = Rotary(seed).eval()
        compiled = rt.compile(module, cache_dir=cache)
        same(compiled, module, torch.ones(2, 4))
        module.scale = torch.rand(4)
        module.angles.zero_()
        same(compiled, module, torch.ones(2, 4))
    assert len(cache.list()) == before + 1


def test_no_weights_at_all(cache: rt.ProgramCache) -> None:
    before = len(cache.list())
    for _ in range(2):
        module = nn.GELU().eval()
        same(rt.compile(module, cache_dir=cache), module, X)
    assert len(cache.list()) == before + 1


def test_tensors_that_are_not_on_the_cpu_are_refused_before_anything_is_compiled(cache: rt.ProgramCache) -> None:
    with torch.device("meta"):
        module = make()
    with pytest.raises(UnsupportedError, match=r"Net: .*a tensor on meta, wanted cpu"):
        rt.compile(module, cache_dir=cache)(X)


def test_methods_of_the_modules_class_are_there(cache: rt.ProgramCache) -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> Frozen:  # noqa: ARG002, FBT001, FBT002
            return super().train(mode=False)

        def reset(self) -> None:
            nn.init.ones_(self.first.weight)

    module = Frozen().eval()
    compiled = rt.compile(module, cache_dir=cache)
    assert compiled.train() is compiled
    assert not compiled.training
    compiled(X)
    compiled.reset()
    same(compiled, module, X)
    assert "Frozen" in repr(compiled)


def test_copies_follow_their_own_module_and_nothing_is_pickled(cache: rt.ProgramCache) -> None:
    compiled = rt.compile(make(), cache_dir=cache)
    compiled(X)
    other = copy.deepcopy(compiled)
    with torch.no_grad():
        other.first.weight.add_(1)
    assert not torch.equal(other(X), compiled(X))
    with pytest.raises(UsageError, match="native code"):
        pickle.dumps(compiled)


def test_saved_and_loaded_without_a_pickle_and_without_a_compiler(
    cache: rt.ProgramCache, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    module = make(4)
    compiled = rt.compile(module, cache_dir=cache)
    for x in (X, X[:2]):
        compiled(x)
    compiled.save_compiled(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"weights.safetensors", "options.json", "programs"}
    assert len(list((tmp_path / "saved" / "programs").glob("*.pt2"))) == 2
    caplog.clear()
    other = make(9)
    loaded = rt.load_compiled(other, tmp_path / "saved")
    for x in (X, X[:2]):
        same(loaded, module, x)
    assert len(lines(caplog, "taken from the cache")) == 2
    with pytest.raises(MismatchError, match=r"first\.weight"):
        rt.load_compiled(nn.Linear(4, 4), tmp_path / "saved")
    (tmp_path / "saved" / "options.json").unlink()
    untouched = make(9)
    with pytest.raises(FormatError, match=r"options\.json"):
        rt.load_compiled(untouched, tmp_path / "saved")
    assert torch.equal(untouched.first.weight, make(9).first.weight)


def test_calls_beside_replacements_run_on_one_set_of_weights(cache: rt.ProgramCache) -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).eval()
    compiled = rt.compile(module, cache_dir=cache, replicas=2)
    one = torch.ones(1, 4)

    def fill(value: float) -> None:
        state = {name: torch.full((4, 4), value) for name in ("0.weight", "1.weight")}
        module.load_state_dict(state, assign=True)

    fill(1.0)
    compiled(one)
    wrong: list[float] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            found = compiled(one)[0, 0].item()
            # 16 w0 w1: both old, both new, or one of each while the module itself is being changed.
            if found not in {16.0, 32.0, 64.0}:
                wrong.append(found)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(50):
        fill(1.0 + number % 2)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    fill(2.0)
    assert compiled(one)[0, 0].item() == 64.0


class Convolved(nn.Module):
    """What a frozen program multiplies into each other."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.relu(self.norm(self.conv(x)))
        return out


def test_frozen_programs_follow_too(cache: rt.ProgramCache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reweft.torch")
    x, before = torch.rand(2, 3, 8, 8), len(cache.list())
    for seed in range(2):
        module = Convolved(seed).eval()
        compiled = rt.compile(module, cache_dir=cache, freeze=True)

        def holds(compiled: Any = compiled, module: nn.Module = module) -> None:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), module(x))

        holds()
        assert compiled.weights_state.name == "LIVE"
        # A version counter of torch's sees none of these.
        module.get_buffer("norm.running_var").data.mul_(3)
        assert compiled.weights_state.name == "NEEDS_REFIT"
        holds()
        module.conv.weight.data.numpy()[0] = 7
        holds()
        module.norm.weight = nn.Parameter(torch.rand(8))
        holds()
        module.load_state_dict(Convolved(seed + 5).state_dict())
        holds()
        assert compiled.weights_state.name == "LIVE"
    assert len(cache.list()) == before + 1
    assert len([line for line in caplog.messages if "changed in place" in line]) == 6
    compiled.save_compiled(tmp_path / "saved")
    again = rt.load_compiled(Convolved(9).eval(), tmp_path / "saved")
    assert torch.equal(again(x), compiled(x))


def test_what_cannot_be_frozen_is_refused_by_its_own_name(cache: rt.ProgramCache) -> None:
    def reads(graph: torch.fx.Graph) -> None:
        held = [node.target for node in graph.nodes if node.op == "get_attr"]
        found = [operator.attrgetter(target)(graph.owning_module) for target in held]
        next(value for value in found if isinstance(value, torch.Tensor) and not value.is_mkldnn).sum().item()

    compiled = rt.compile(
        Convolved(0).eval(), cache_dir=cache, freeze=True, options={"post_grad_custom_post_pass": reads}
    )
    with pytest.raises(UnsupportedError, match=r"cannot be frozen: '(conv|norm)\.(weight|bias|running_\w+)'"):
        compiled(torch.rand(2, 3, 8, 8))
