"""`load_into` by copy: every source gives what `load_state_dict` gives, in place, and a failure changes nothing."""

# What a module holds is a tensor or a module, which no checker can tell.
# mypy: disable-error-code="arg-type,assignment,attr-defined,comparison-overlap,index,operator,override,union-attr"
# mypy: allow-untyped-calls

from __future__ import annotations

import copy
import enum
import gc
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reweft
import reweft.torch as rt
from modules import DTYPES, Tied, WithState, assert_equal, bits, make, save, values
from reweft.torch import loading


class Kind(enum.Enum):
    """Something that no reader of plain data makes."""

    ONE = 1


class Keeps(nn.Module):
    """Keeps its extra state as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: object = 0

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: object) -> None:
        self.kept = state


class Holder(nn.Module):
    """Whatever tensors, as parameters and buffers."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def fills(module: nn.Module, source: Any, **options: Any) -> bool:
    """Whether the bytes go the short way."""
    load = loading._Load(module, loading._weights(source, None, None), "copy", allow_cast=options.get("cast", False))
    load.check(strict=True)
    return load.can_fill()


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state_dict", "open", "mapped", "memory", "bytes"])
def test_every_source_gives_what_load_state_dict_gives(kind: str, tmp_path: Path) -> None:
    state = make(1).state_dict()
    wanted = make(2)
    wanted.load_state_dict(state)
    net = make(0)
    held = dict(net.named_parameters(remove_duplicate=False))
    addresses = {name: tensor.data_ptr() for name, tensor in net.state_dict().items()}
    sources: dict[str, Any] = {
        "pt": lambda: save(state, tmp_path, "pt"),
        "safetensors": lambda: save(state, tmp_path, "safetensors"),
        "state_dict": lambda: state,
        "open": lambda: reweft.open(save(state, tmp_path, "pt")),
        "mapped": lambda: reweft.open(save(state, tmp_path, "pt"), mmap=True),
        "memory": lambda: rt.checkpoint_of(state),
        "bytes": lambda: reweft.open(save(state, tmp_path, "safetensors").read_bytes()),
    }
    result = rt.load_into(net, sources[kind]())
    assert result == ([], [])
    assert result.missing_keys == []
    assert_equal(net.state_dict(), wanted.state_dict())
    assert {name: id(tensor) for name, tensor in held.items()} == {
        name: id(tensor) for name, tensor in net.named_parameters(remove_duplicate=False)
    }
    assert {name: tensor.data_ptr() for name, tensor in net.state_dict().items()} == addresses
    assert net["conv"].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_plain_module_is_filled_without_a_copy(kind: str, tmp_path: Path) -> None:
    assert fills(make(0), save(make(1).state_dict(), tmp_path, kind))
    assert fills(make(0), make(1).state_dict())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_every_dtype_and_layout(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if kind == "safetensors" and dtype == torch.complex128:
        pytest.skip("safetensors has no complex128")
    torch.manual_seed(0)

    def filled(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
        return raw.view(dtype).reshape(shape)

    state = {
        "row": filled(3, 5),
        "transposed": filled(5, 4),
        "last": filled(2, 3, 4, 5),
        "scalar": filled(),
        "none": filled(0, 3),
    }
    net = Holder(
        row=torch.zeros(3, 5, dtype=dtype),
        transposed=torch.zeros(4, 5, dtype=dtype).t(),
        last=torch.zeros(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last),
        scalar=torch.zeros((), dtype=dtype),
        none=torch.zeros(0, 3, dtype=dtype),
    )
    reference = copy.deepcopy(net)
    reference.load_state_dict(state)
    path = save(state, tmp_path, kind)
    assert fills(net, path)
    rt.load_into(net, path)
    assert_equal(net.state_dict(), reference.state_dict())
    assert net.transposed.stride() == (1, 5)


def test_payloads_of_nan_are_kept(tmp_path: Path) -> None:
    raw = torch.tensor([0x7FC00001, 0x7F800001, 0xFFC12345 - (1 << 32), 0x7FFFFFFF], dtype=torch.int32)
    net = nn.Linear(4, 1, bias=False)
    for source in (
        save({"weight": raw.view(torch.float32)[None]}, tmp_path, "pt"),
        {"weight": raw.view(torch.float32)[None]},
    ):
        rt.load_into(net, source)
        assert bits(net.weight) == bits(raw)
        nn.init.zeros_(net.weight)


def test_views_with_gaps_and_of_each_other_are_loaded_in_order(tmp_path: Path) -> None:
    big = torch.zeros(4, 6)
    net = Holder(left=big[:, :3], right=big[:, 3:], whole=torch.zeros(2, 2))
    net.register_buffer("first", net.whole[0])
    state = {"left": torch.rand(4, 3), "right": torch.rand(4, 3), "whole": torch.rand(2, 2)}
    state["first"] = state["whole"][0].clone()
    path = save(state, tmp_path, "safetensors")
    assert not fills(net, path)
    rt.load_into(net, path)
    assert_equal(net.state_dict(), state)
    before, state["first"] = values(net), torch.full((2,), 7.0)
    state["left"] += 1
    with pytest.raises(reweft.MismatchError, match="memory is that of another name"):
        rt.load_into(net, state)
    assert_equal(values(net), before)


def test_expanded_parameters_are_refused_by_name() -> None:
    net = Holder(scale=torch.zeros(1).expand(3))
    with pytest.raises(reweft.UnsupportedError, match=r"'scale': elements of the parameter share memory"):
        rt.load_into(net, {"scale": torch.ones(3)})


def test_the_own_memory_as_source() -> None:
    net = make(0)
    before = values(net)
    rt.load_into(net, net.state_dict())
    assert_equal(values(net), before)
    # Each is written from what the other was before the call.
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    a, b = net["a"].weight.detach().clone(), net["b"].weight.detach().clone()
    rt.load_into(net, {"a.weight": net["b"].weight, "b.weight": net["a"].weight})
    assert torch.equal(net["a"].weight, b)
    assert torch.equal(net["b"].weight, a)


def test_a_source_that_overlaps_its_target_by_an_offset() -> None:
    memory = torch.arange(8.0)
    net = Holder(w=memory[1:7])
    rt.load_into(net, {"w": memory[:6]})
    assert net.w.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(reweft.UsageError, match="shares memory"):
        rt.checkpoint_of({"w": memory[:6]})._core.fill(["w"], [memory[1:7]], cast=False)


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state_dict"])
def test_autograd_notices(kind: str, tmp_path: Path) -> None:
    net, other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    source = other.state_dict() if kind == "state_dict" else save(other.state_dict(), tmp_path, kind)
    loss = net(torch.rand(2, 3)).sum()
    version = net[1].weight._version
    rt.load_into(net, source)
    assert net[1].weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    net(torch.rand(2, 3)).sum().backward()
    assert net[0].weight.requires_grad
    assert net[0].weight.is_leaf


def test_the_optimizer_goes_on_with_the_new_values(tmp_path: Path) -> None:
    nets = [nn.Linear(3, 2), nn.Linear(3, 2)]
    nets[1].load_state_dict(nets[0].state_dict())
    state = nn.Linear(3, 2).state_dict()
    path, x = save(state, tmp_path, "pt"), torch.rand(4, 3)
    for net, load in zip(nets, (lambda n: rt.load_into(n, path), lambda n: n.load_state_dict(state)), strict=True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
            if step == 1:
                load(net)
    assert_equal(nets[0].state_dict(), nets[1].state_dict())


def test_compiled_functions_see_the_new_values(tmp_path: Path) -> None:
    net, x = nn.Linear(3, 2), torch.rand(2, 3)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    state = nn.Linear(3, 2).state_dict()
    with torch._dynamo.config.patch(error_on_recompile=True):
        rt.load_into(net, save(state, tmp_path, "pt"))
        assert torch.equal(compiled(x), nn.functional.linear(x, state["weight"], state["bias"]))


REFUSED: dict[str, tuple[Any, str]] = {
    "shape": (
        lambda s: s | {"weight": torch.zeros(3, 2)},
        r"'weight': found float32 \[3, 2\], wanted float32 \[2, 3\]",
    ),
    "dtype": (lambda s: s | {"bias": torch.zeros(2, dtype=torch.float16)}, r"'bias': found float16 .*\n.*allow_cast"),
    "integer": (
        lambda s: s | {"bias": torch.zeros(2, dtype=torch.int64)},
        r"'bias': found int64 \[2\], wanted float32",
    ),
    "missing": (lambda s: {"weight": s["weight"]}, "missing keys: bias"),
    "unexpected": (lambda s: s | {"more": torch.zeros(1)}, "unexpected keys: more"),
}


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state_dict"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_changes_nothing(what: str, kind: str, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    net = nn.Linear(3, 2)
    state = change({key: torch.ones_like(value) for key, value in net.state_dict().items()})
    source = state if kind == "state_dict" else save(state, tmp_path, kind)
    before = values(net)
    with pytest.raises(reweft.MismatchError, match=message) as error:
        rt.load_into(net, source)
    assert_equal(values(net), before)
    assert error.value.key in {"weight", "bias", "more"}
    assert kind == "state_dict" or str(source) in str(error.value)


def test_not_strict_says_what_is_left(tmp_path: Path) -> None:
    net, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3), "more": torch.zeros(1)}
    wanted = reference.load_state_dict(state, strict=False)
    for source in (state, save(state, tmp_path, "pt"), save(state, tmp_path, "safetensors")):
        nn.init.zeros_(net.weight)
        assert rt.load_into(net, source, strict=False) == wanted
        assert torch.equal(net.weight, reference.weight)
    with pytest.raises(reweft.MismatchError, match=r"found float32 \[2\]"):
        rt.load_into(net, state | {"weight": torch.zeros(2)}, strict=False)


@pytest.mark.parametrize(
    "pair", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float64", "float16"), ("float32", "float8_e4m3fn")]
)
def test_casts_between_floats_round_as_torch_does(pair: tuple[str, str], tmp_path: Path) -> None:
    source, target = (getattr(torch, name) for name in pair)
    state = {"weight": torch.randn(64, 33, dtype=torch.float64).to(source)}
    for weight in (torch.zeros(64, 33, dtype=target), torch.zeros(33, 64, dtype=target).t()):
        net, reference = Holder(weight=weight), Holder(weight=torch.zeros(64, 33, dtype=target))
        reference.load_state_dict(state)
        for found in (save(state, tmp_path, "pt"), state):
            net.weight.zero_()
            rt.load_into(net, found, allow_cast=True)
            assert_equal(net.state_dict(), reference.state_dict())


def test_no_cast_from_integers() -> None:
    with pytest.raises(reweft.MismatchError, match="found int64"):
        rt.load_into(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1, dtype=torch.int64)}, allow_cast=True)


def test_key_maps_with_operations(tmp_path: Path) -> None:
    q, k, v = (torch.rand(4, 4) for _ in range(3))
    state = {
        "module.qkv": torch.cat([q, k, v]),
        "module.a": torch.rand(4, 2),
        "module.b": torch.rand(2, 4),
        "x": torch.rand(8).double(),
    }
    keys = reweft.KeyMap([
        {"strip_prefix": "module."},
        {"match": "^qkv$", "split": ["q", "k", "v"], "dim": 0},
        {"match": "^q$", "transpose": [0, 1]},
        {"match": "^b$", "permute": [1, 0]},
        {"concat": ["^a$", "^b$"], "into": "ab", "dim": 1},
        {"match": "^x$", "reshape": [2, 4]},
        {"match": "^x$", "cast": "float32"},
    ])  # fmt: skip
    wanted = {"q": q.t(), "k": k, "v": v, "ab": torch.cat([state["module.a"], state["module.b"].t()], 1)}
    wanted["x"] = state["x"].reshape(2, 4).float()
    for source in (save(state, tmp_path, "pt"), save(state, tmp_path, "safetensors"), state):
        net = Holder(**{name: torch.zeros(value.shape) for name, value in wanted.items()})
        rt.load_into(net, source, keys=keys)
        assert_equal(net.state_dict(), {name: wanted[name].contiguous() for name in net.state_dict()})


def test_a_top_level_key(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save({"model": state, "epoch": 3}, tmp_path / "training.pt")
    net = nn.Linear(3, 2)
    rt.load_into(net, tmp_path / "training.pt", top_level_key="model")
    assert_equal(net.state_dict(), dict(state))
    with pytest.raises(reweft.UsageError, match="checkpoint files"):
        rt.load_into(net, state, top_level_key="model")


def test_tied_weights(tmp_path: Path) -> None:
    net = Tied()
    state = Tied().state_dict()
    # What safetensors files of tied models look like.
    rt.save_file({key: value for key, value in state.items() if key != "head.weight"}, tmp_path / "one.safetensors")
    assert rt.load_into(net, tmp_path / "one.safetensors") == ([], [])
    assert torch.equal(net.head.weight, state["inner.weight"])
    rt.save_file({key: value.clone() for key, value in state.items()}, tmp_path / "two.safetensors")
    assert fills(net, tmp_path / "two.safetensors")
    before = values(net)
    torn = {key: value.clone() for key, value in state.items()}
    torn["head.weight"][0, 0] += 1
    for source in (torn, save(torn, tmp_path, "pt")):
        with pytest.raises(reweft.MismatchError, match=r"'head.weight': tied to 'inner.weight'"):
            rt.load_into(net, source)
        assert_equal(values(net), before)
    assert net.head.weight is net.inner.weight


def test_old_files_of_one_element(tmp_path: Path) -> None:
    net = Holder(scale=torch.zeros(()))
    for source in ({"scale": torch.tensor([3.0])}, save({"scale": torch.tensor([4.0])}, tmp_path, "pt")):
        rt.load_into(net, source)
    assert net.scale.item() == 4
    with pytest.raises(reweft.MismatchError, match=r"found float32 \[\], wanted float32 \[1\]"):
        rt.load_into(Holder(scale=torch.zeros(1)), {"scale": torch.tensor(3.0)})


def test_parameters_that_are_none() -> None:
    net = nn.Linear(3, 2, bias=False)
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    with pytest.raises(RuntimeError, match="Unexpected"):
        nn.Linear(3, 2, bias=False).load_state_dict(state)
    with pytest.raises(reweft.MismatchError, match="unexpected keys: bias"):
        rt.load_into(net, state)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["sparse", "quantised", "meta"])
def test_other_kinds_of_tensors_are_refused_by_name(kind: str) -> None:
    makers: dict[str, Any] = {
        "sparse": lambda: torch.ones(2, 3).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
        "meta": lambda: torch.ones(2, 3, device="meta"),
    }
    net = nn.Linear(3, 2, bias=False)
    before = values(net)
    with pytest.raises(reweft.ReweftError, match="weight"):
        rt.load_into(net, {"weight": makers[kind]()})
    assert_equal(values(net), before)


def test_lazily_conjugated_and_negated_tensors() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    net = Holder(a=torch.zeros(3, dtype=torch.complex64), b=torch.zeros(3))
    rt.load_into(net, {"a": z.conj(), "b": z.conj().imag})
    assert net.a.tolist() == z.conj().tolist()
    assert net.b.tolist() == z.conj().imag.tolist()


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        net, state = nn.Linear(3, 2), nn.Linear(3, 2).state_dict()
        rt.load_into(net, state)
        assert torch.equal(net.weight, state["weight"])
    with pytest.raises(reweft.UnsupportedError, match=r"'weight': a tensor of inference mode"):
        rt.load_into(net, state)
    plain = nn.Linear(3, 2)
    rt.load_into(plain, state)
    assert torch.equal(plain.weight, state["weight"])


def test_a_module_without_memory_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    path = save(nn.Linear(3, 2).state_dict(), tmp_path, "pt")
    with pytest.raises(reweft.UnsupportedError, match=r"'weight': the parameter is on the meta device(.|\n)*assign"):
        rt.load_into(net, path)


@pytest.mark.parametrize("cut", [1, 100, 4000])
def test_damaged_files_change_nothing(cut: int, tmp_path: Path) -> None:
    net = nn.Linear(40, 25)
    before, state = values(net), nn.Linear(40, 25).state_dict()
    for kind in ("pt", "safetensors"):
        path = save(state, tmp_path, kind)
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        with pytest.raises(reweft.FormatError):
            rt.load_into(net, path)
        assert_equal(values(net), before)
    path = save(state, tmp_path, "pt")
    data = bytearray(path.read_bytes())
    at = data.index(state["weight"].numpy().tobytes())
    data[at + 2000] ^= 1
    path.write_bytes(data)
    for net_of_kind in (net, hooked(nn.Linear(40, 25))):
        before = values(net_of_kind)
        with pytest.raises(reweft.FormatError, match="CRC"):
            rt.load_into(net_of_kind, path)
        assert_equal(values(net_of_kind), before)


def test_a_file_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    net = nn.Linear(40, 25)
    path = save(nn.Linear(40, 25).state_dict(), tmp_path, "safetensors")
    checkpoint = reweft.open(path)
    path.write_bytes(path.read_bytes()[:-2000])
    for each in (net, hooked(nn.Linear(40, 25))):
        before = values(each)
        with pytest.raises(reweft.ReweftError, match="shorter"):
            rt.load_into(each, checkpoint)
        assert_equal(values(each), before)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_tensors_of_several_pieces(kind: str, tmp_path: Path) -> None:
    state = {"large": torch.rand(3_000_000), "odd": torch.rand(7), "second": torch.rand(1_500_000)}
    net = Holder(large=torch.zeros(3_000_000), odd=torch.zeros(7), second=torch.zeros(1_500_000))
    path = save(state, tmp_path, kind)
    rt.load_into(net, path)
    assert_equal(net.state_dict(), state)
    rt.load_into(net, {key: value.half() for key, value in state.items()}, allow_cast=True)
    assert torch.equal(net.large, state["large"].half().float())
    before, data = values(net), path.read_bytes()
    checkpoint = reweft.open(path)
    path.write_bytes(data[: data.index(state["second"].numpy().tobytes()) + 100])
    with pytest.raises(reweft.ReweftError, match="shorter"):
        rt.load_into(net, checkpoint)
    assert_equal(values(net), before)
    if kind == "pt":
        at = data.index(state["large"].numpy().tobytes()) + 11_000_000
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(reweft.FormatError, match="CRC"):
            rt.load_into(net, path)
        assert_equal(values(net), before)


def test_a_file_that_was_written_over_after_it_was_opened(tmp_path: Path) -> None:
    net = nn.Linear(40, 25)
    before, state = values(net), nn.Linear(40, 25).state_dict()
    path = save(state, tmp_path, "pt")
    checkpoint = reweft.open(path)
    with path.open("r+b") as file:
        at = path.read_bytes().index(state["weight"].numpy().tobytes())
        file.seek(at)
        file.write(bytes(4000))
    with pytest.raises(reweft.FormatError, match="CRC"):
        rt.load_into(net, checkpoint)
    assert_equal(values(net), before)


def hooked(net: nn.Module) -> nn.Module:
    """The same with a hook that does nothing, so that it goes the long way."""
    net.register_load_state_dict_post_hook(lambda *_: None)
    return net


def test_hooks_run_as_in_load_state_dict(tmp_path: Path) -> None:
    calls: list[Any] = []

    def before(_module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        calls.append(("pre", prefix, sorted(state), rest[1]))
        state[prefix + "weight"] = state.pop(prefix + "w")

    def after(_module: nn.Module, keys: Any) -> None:
        calls.append(("post", list(keys.missing_keys), list(keys.unexpected_keys)))
        keys.missing_keys.clear()

    def hooks(net: nn.Module) -> nn.Module:
        net[0].register_load_state_dict_pre_hook(before)
        net.register_load_state_dict_post_hook(after)
        return net

    state = {"0.w": torch.ones(2, 3), "0.bias": torch.ones(2)}
    net, reference = hooks(nn.Sequential(nn.Linear(3, 2))), hooks(nn.Sequential(nn.Linear(3, 2)))
    wanted = reference.load_state_dict(state, strict=False)
    seen, calls = calls, []
    for source in (state, save(state, tmp_path, "pt"), save(state, tmp_path, "safetensors")):
        calls.clear()
        net[0].weight.data.zero_()
        assert rt.load_into(net, source, strict=False) == wanted
        assert calls == seen
        assert_equal(net.state_dict(), reference.state_dict())


@pytest.mark.parametrize("kind", ["pt", "state_dict"])
def test_a_hook_that_fails_half_way_changes_nothing(kind: str, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("mine")

    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].register_buffer("count", torch.zeros(2), persistent=False)

    def spoil(module: nn.Module, _keys: Any) -> None:
        module.weight = nn.Parameter(torch.zeros(1))
        module.count.fill_(9)
        module.note = "spoiled"
        module.register_buffer("more", torch.zeros(1))

    net[1].register_load_state_dict_post_hook(spoil)
    net[2].register_load_state_dict_pre_hook(fail)
    before, objects = values(net), {name: id(p) for name, p in net.named_parameters()}
    state = {key: torch.ones_like(value) for key, value in before.items()}
    source = state if kind == "state_dict" else save(state, tmp_path, kind)
    with pytest.raises(KeyError, match="mine"):
        rt.load_into(net, source)
    assert_equal(values(net), before)
    assert {name: id(p) for name, p in net.named_parameters()} == objects
    assert net[1].count.tolist() == [0, 0]
    assert not hasattr(net[1], "note")
    assert not hasattr(net[1], "more")


def test_extra_state() -> None:
    net = nn.Sequential(WithState(), WithState())
    state = net.state_dict()
    for number in range(2):
        state[f"{number}.weight"] = torch.ones(2)
        state[f"{number}._extra_state"] = [number, 7]
    rt.load_into(net, state)
    assert (net[0].history, net[1].history) == ([0, 7], [1, 7])
    state["0._extra_state"], state["1._extra_state"], state["0.weight"] = [5], [13], torch.full((2,), 5.0)
    with pytest.raises(ValueError, match="unlucky"):
        rt.load_into(net, state)
    assert (net[0].history, net[1].history) == ([0, 7], [1, 7])
    assert net[0].weight.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["zip", "legacy", "nested"])
@pytest.mark.parametrize(
    "extra",
    [[3, 7], {"seen": (1, 2.5, None), "bytes": b"\0", "more": OrderedDict(a=[True])}, None, "text", 2**70, []],
    ids=["list", "dict", "none", "text", "large", "empty"],
)
def test_extra_state_of_files_is_what_torch_load_gives(kind: str, extra: object, tmp_path: Path) -> None:
    net, path = nn.Sequential(nn.Linear(2, 2), Keeps()), tmp_path / "state.pt"
    state = net.state_dict()
    state["1._extra_state"] = extra
    torch.save({"model": state} if kind == "nested" else state, path, _use_new_zipfile_serialization=kind != "legacy")
    wanted, key = nn.Sequential(nn.Linear(2, 2), Keeps()), "model" if kind == "nested" else None
    wanted.load_state_dict(state)
    rt.load_into(net, path, top_level_key=key)
    assert net[1].kept == wanted[1].kept
    assert type(net[1].kept) is type(wanted[1].kept)


def test_extra_state_of_files_that_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    net, path = nn.Sequential(Keeps()), tmp_path / "state.pt"
    before = net[0].kept
    for extra in ({"scale": torch.ones(2), "n": 3}, io.BytesIO(b"abc"), torch.float16, {"kind": Kind.ONE}):
        torch.save({**net.state_dict(), "0._extra_state": extra}, path)
        for strict in (True, False):
            with pytest.raises(reweft.UnsupportedError, match=r"0\._extra_state(.|\n)*pass a state_dict"):
                rt.load_into(net, path, strict=strict)
    torch.save({**net.state_dict(), "0._extra_state": [1]}, path)
    with pytest.raises(reweft.MismatchError, match=r"0\._extra_state(.|\n)*pass a state_dict"):
        rt.load_into(net, path, keys=reweft.KeyMap([("^x", "y")]))
    assert net[0].kept is before


@pytest.mark.parametrize("kind", ["zip", "legacy", "nested"])
def test_versions_of_files_are_what_torch_load_gives(kind: str, tmp_path: Path) -> None:
    seen: list[object] = []

    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            seen.append(dict(local))
            super()._load_from_state_dict(state, prefix, local, *rest)

    net, path = nn.Sequential(Versioned(2, 2), nn.Sequential(Versioned(2, 2))), tmp_path / "state.pt"
    state = net.state_dict()
    state._metadata["1.0"]["note"] = "kept"
    torch.save({"model": state} if kind == "nested" else state, path, _use_new_zipfile_serialization=kind != "legacy")
    rt.load_into(net, path, top_level_key="model" if kind == "nested" else None)
    assert seen == [{"version": 3}, {"version": 3, "note": "kept"}]
    seen.clear()
    rt.load_into(net, save(dict(state), tmp_path, "safetensors"))
    assert seen == [{}, {}]
    state._metadata = [1]
    torch.save(state, path)
    with pytest.raises(reweft.FormatError, match="_metadata"):
        rt.load_into(net, path)


def test_versions_of_a_file_decide_what_may_be_missing(tmp_path: Path) -> None:
    net, path = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), tmp_path / "state.pt"
    state = net.state_dict()
    del state["0.num_batches_tracked"]
    torch.save(state, path)
    with pytest.raises(reweft.MismatchError, match=r"0\.num_batches_tracked"):
        rt.load_into(net, path)
    state._metadata["0"]["version"] = 1
    torch.save(state, path)
    net[0].num_batches_tracked.fill_(5)
    assert rt.load_into(net, path) == ([], [])
    assert net[0].num_batches_tracked == 5


def test_versions_of_a_state_dict_are_kept() -> None:
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    new, old = OrderedDict(state), OrderedDict(state)
    new._metadata = {"": {"version": 2}}
    old._metadata = {"": {"version": 1}}
    net = nn.BatchNorm1d(3)
    net.num_batches_tracked.fill_(5)
    assert rt.load_into(net, old) == ([], [])
    assert net.num_batches_tracked == 5
    with pytest.raises(reweft.MismatchError, match="num_batches_tracked"):
        rt.load_into(net, new)


def test_weight_norm_of_the_old_kind() -> None:
    old = nn.utils.weight_norm(nn.Linear(3, 2))
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    rt.load_into(net, old.state_dict())
    assert torch.equal(net.parametrizations.weight.original0, old.weight_g)
    wrong = {key: value.double() for key, value in old.state_dict().items()}
    before = values(net)
    with pytest.raises(reweft.MismatchError, match="found float64"):
        rt.load_into(net, wrong)
    assert_equal(values(net), before)


def test_lazy_modules(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    net = nn.LazyLinear(2)
    rt.load_into(net, save(state, tmp_path, "pt"))
    assert_equal(net.state_dict(), dict(state))
    lazy = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    with pytest.raises(reweft.ReweftError):
        rt.load_into(lazy, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), "1.weight": torch.ones(5, 5)})
    assert isinstance(lazy[0].weight, nn.UninitializedParameter)
    assert isinstance(lazy[0], nn.LazyLinear)
    lazy(torch.rand(1, 3))


def test_own_loading_code(tmp_path: Path) -> None:
    class Own(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            state_dict[prefix + "bias"] = state_dict.pop(prefix + "shift") * 2
            super()._load_from_state_dict(state_dict, prefix, *rest)

    net = nn.Sequential(Own(3, 2))
    state = {"0.weight": torch.ones(2, 3), "0.shift": torch.ones(2)}
    for source in (state, save(state, tmp_path, "safetensors")):
        rt.load_into(net, source)
        assert net[0].bias.tolist() == [2, 2]


def test_whoever_changed_load_state_dict_is_asked() -> None:
    class Mine(nn.Linear):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: FBT001, FBT002
            return super().load_state_dict({key: value + 1 for key, value in state_dict.items()}, strict, assign)

    net = Mine(1, 1)
    rt.load_into(net, {"weight": torch.ones(1, 1), "bias": torch.ones(1)})
    assert (net.weight.item(), net.bias.item()) == (2, 2)


def test_the_process_wide_flag_does_not_change_copy() -> None:
    net = nn.Linear(3, 2)
    weight, address = net.weight, net.weight.data_ptr()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        rt.load_into(hooked(net), nn.Linear(3, 2).state_dict())
        assert torch.__future__.get_swap_module_params_on_conversion()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert net.weight is weight
    assert weight.data_ptr() == address


def test_modes_and_sources_that_do_not_exist() -> None:
    with pytest.raises(reweft.UsageError, match="mode is 'move'"):
        rt.load_into(nn.Linear(1, 1), {}, mode="move")
    with pytest.raises(reweft.UsageError, match="source is a Linear"):
        rt.load_into(nn.Linear(1, 1), nn.Linear(1, 1))
    with pytest.raises(reweft.MismatchError, match=r"'weight': a int, wanted a tensor"):
        rt.load_into(nn.Linear(1, 1, bias=False), {"weight": 3})


def test_nothing_is_held_afterwards(tmp_path: Path) -> None:
    net = make(0)
    path = save(make(1).state_dict(), tmp_path, "pt")
    rt.load_into(net, path)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    weight = net["conv"].weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.zeros(1)))


def test_a_name_of_batch_norm_that_was_left_out(tmp_path: Path) -> None:
    def norms() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))

    state, net = norms().state_dict(), norms()
    del state["1.num_batches_tracked"]
    path = save(state, tmp_path, "safetensors")
    with pytest.raises(reweft.MismatchError, match=r"missing keys: 1\.num_batches_tracked"):
        rt.load_into(net, path)
    # Files of before version 2 have none of them.
    del state["0.num_batches_tracked"]
    net[0].num_batches_tracked.fill_(5)
    assert rt.load_into(net, save(state, tmp_path, "safetensors")) == ([], [])
    assert net[0].num_batches_tracked == 5


def with_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def with_orthogonal_weight() -> nn.Module:
    return nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def compiled() -> Any:
    return torch.compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), backend="eager")


def used_twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.InstanceNorm1d(4, track_running_stats=True), layer)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("maker", [with_spectral_norm, with_orthogonal_weight, scripted, compiled, used_twice])
def test_modules_that_torch_changes(maker: Any, tmp_path: Path) -> None:
    state, reference = maker().state_dict(), maker()
    reference.load_state_dict(state)
    torch.save(state, tmp_path / "weights.pt")
    for source in (state, tmp_path / "weights.pt"):
        net = maker()
        assert rt.load_into(net, source) == ([], [])
        assert_equal(net.state_dict(), reference.state_dict())


def test_a_parameter_class_of_ones_own_stays() -> None:
    class Mine(nn.Parameter):
        pass

    net = nn.Linear(2, 2)
    net.weight = Mine(torch.zeros(2, 2))
    net.weight.note = "kept"
    state = nn.Linear(2, 2).state_dict()
    rt.load_into(net, state)
    assert type(net.weight) is Mine
    assert net.weight.note == "kept"
    assert torch.equal(net.weight, state["weight"])
    for mode in ("assign", "swap"):
        with pytest.raises(reweft.UnsupportedError, match="the parameter is a Mine"):
            rt.load_into(net, state, mode=mode)
