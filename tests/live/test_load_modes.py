"""`load_into` by assigning and swapping, and what becomes of tensor subclasses."""

# What a module holds is a tensor or a module, which no checker can tell.
# mypy: disable-error-code="arg-type,assignment,attr-defined,comparison-overlap,index,operator,override,union-attr"
# mypy: allow-untyped-calls

from __future__ import annotations

import copy
import json
import struct
import weakref
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate

import reweft
import reweft.torch as rt
from modules import Tied, WithState, assert_equal, make, save, values

aten = torch.ops.aten


def on_meta(make_module: Any) -> Any:
    with torch.device("meta"):
        return make_module()


# Assign.


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state_dict", "memory"])
def test_assigned_weights_equal_those_that_load_state_dict_assigns(kind: str, tmp_path: Path) -> None:
    state = make(1).state_dict()
    source: Any = state if kind == "state_dict" else rt.checkpoint_of(state) if kind == "memory" else None
    net, reference = on_meta(make_module=lambda: make(0)), on_meta(lambda: make(0))
    net["tied"].inner.weight.requires_grad_(requires_grad=False)
    rt.load_into(net, source or save(state, tmp_path, kind), mode="assign")
    reference.load_state_dict(state, assign=True)
    assert_equal(net.state_dict(), reference.state_dict())
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [
        name != "tied.inner.weight" for name, _ in net.named_parameters()
    ]
    # torch makes two parameters of one here.
    assert net["tied"].head.weight is net["tied"].inner.weight
    assert reference["tied"].head.weight is not reference["tied"].inner.weight


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_assigned_weights_are_mapped_and_may_be_trained(kind: str, tmp_path: Path) -> None:
    path = save(nn.Linear(64, 64).state_dict(), tmp_path, kind)
    before = path.read_bytes()
    nets = [on_meta(lambda: nn.Linear(64, 64)) for _ in range(2)]
    for net in nets:
        rt.load_into(net, path, mode="assign")
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=1.0)
    nets[0](torch.rand(2, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(nets[0].weight, nets[1].weight)
    assert path.read_bytes() == before
    # A checkpoint that was opened once gives the file's values each time.
    checkpoint = reweft.open(path, mmap=True)
    for net in nets:
        rt.load_into(net, checkpoint, mode="assign")
        net.weight.detach().zero_()
    rt.load_into(nets[0], checkpoint, mode="copy")
    assert nets[0].weight.any()
    path.unlink()
    assert nets[0].weight.sum().isfinite()


def test_assigned_tensors_of_memory_are_objects_of_their_own() -> None:
    state = dict(nn.Linear(3, 2).state_dict(keep_vars=True))
    net = on_meta(lambda: nn.Linear(3, 2)).requires_grad_(requires_grad=False)
    rt.load_into(net, state, mode="assign")
    assert net.weight is not state["weight"]
    assert net.weight.data_ptr() == state["weight"].data_ptr()
    assert state["weight"].requires_grad


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    )
    path = tmp_path / "odd.safetensors"
    path.write_bytes(
        struct.pack("<Q", len(header)) + header.encode() + bytes([1, 0, 1]) + struct.pack("<2f", 1.5, -2.5)
    )
    found = rt.load_file(path)
    assert found["b"].tolist() == [1.5, -2.5]
    assert found["b"].data_ptr() % 4 == 0


def test_what_stays_on_meta_is_named() -> None:
    class Rotary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("inverse", torch.ones(2), persistent=False)

    net = on_meta(Rotary)
    with pytest.warns(UserWarning, match="still on the meta device.*: inverse"):
        rt.load_into(net, nn.Linear(3, 2).state_dict(), mode="assign")
    assert net.inverse.is_meta
    net = on_meta(lambda: nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=": bias; compute"):
        assert rt.load_into(net, {"weight": torch.ones(2, 3)}, mode="assign", strict=False) == (["bias"], [])


@pytest.mark.parametrize("mode", ["assign", "swap"])
def test_other_dtypes_and_devices_are_not_assigned(mode: Any) -> None:
    net = nn.Linear(3, 2)
    half = {key: value.half() for key, value in net.state_dict().items()}
    before, objects = values(net), [id(p) for p in net.parameters()]
    with pytest.raises(reweft.MismatchError, match="found float16"):
        rt.load_into(net, half, mode=mode)
    with pytest.raises(reweft.MismatchError, match="found a tensor on meta, wanted cpu"):
        rt.load_into(net, {key: value.to("meta") for key, value in before.items()}, mode=mode)
    with torch.inference_mode():
        inferred = nn.Linear(3, 2).state_dict()
    with pytest.raises(reweft.UnsupportedError, match="inference"):
        rt.load_into(net, inferred, mode=mode)
    assert_equal(values(net), before)
    assert [id(p) for p in net.parameters()] == objects
    rt.load_into(net, half, mode=mode, allow_cast=True)
    assert net.weight.dtype == torch.float32
    assert torch.equal(net.weight, half["weight"].float())


def test_tied_names_with_two_values_are_not_assigned() -> None:
    state = {key: value.clone() for key, value in Tied().state_dict().items()}
    net = on_meta(Tied)
    state["head.weight"] += 1
    with pytest.raises(reweft.MismatchError, match=r"tied to 'inner\.weight'"):
        rt.load_into(net, state, mode="assign")
    assert net.head.weight is net.inner.weight
    assert net.head.weight.is_meta


@pytest.mark.parametrize("mode", ["assign", "swap"])
def test_a_failure_half_way_puts_the_objects_back(mode: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3), WithState())
    net[0](torch.rand(2, 3)).sum().backward()
    before, objects = values_of_tensors(net), [id(p) for p in net.parameters()]
    addresses, grad = [p.data_ptr() for p in net.parameters()], net[0].weight.grad
    state = {key: torch.ones_like(value) for key, value in before.items()} | {"1._extra_state": [13]}
    with pytest.raises(ValueError, match="unlucky"):
        rt.load_into(net, state, mode=mode)
    assert_equal(values_of_tensors(net), before)
    assert [id(p) for p in net.parameters()] == objects
    assert [p.data_ptr() for p in net.parameters()] == addresses
    assert net[0].weight.grad is grad
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    assert net[1].history == [0]


def values_of_tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in net.named_parameters()}


# Swap.


def test_swapped_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    net = nn.Sequential(Tied().inner, nn.BatchNorm1d(4), Tied())
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    objects = [id(p) for p in net.parameters()]
    for kind in ("state_dict", "pt", "safetensors"):
        state = {key: value.clone() for key, value in other.state_dict().items()}
        source = state if kind == "state_dict" else save(state, tmp_path, kind)
        rt.load_into(net, source, mode="swap")
        assert_equal(net.state_dict(), dict(other.state_dict()))
        assert [id(p) for p in net.parameters()] == objects == [id(p) for p in optimizer.param_groups[0]["params"]]
        assert net[2].head.weight is net[2].inner.weight
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in net.parameters())
        net(torch.rand(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in other.parameters():
            nn.init.normal_(parameter)
    assert not torch.__future__.get_swap_module_params_on_conversion()


def test_what_torch_cannot_swap_is_said_before_anything_changes() -> None:
    cases: list[tuple[Any, str]] = []
    net = nn.Sequential(nn.Linear(3, 2), nn.LSTM(2, 2))
    cases.append((net, r"'1.weight_ih_l0': cannot be swapped: LSTM keeps weak references"))
    cases += [(kind(2, 2), f"{kind.__name__} keeps weak references") for kind in (nn.GRU, nn.RNN)]
    viewed = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    view = viewed[1].weight.view(4)
    cases.append((viewed, r"'1.weight': cannot be swapped: a view of it is alive"))
    watched = nn.Linear(3, 2)
    reference = weakref.ref(watched.bias)
    cases.append((watched, r"'bias': cannot be swapped: something keeps weak references"))
    for module, message in cases:
        before = values(module)
        with pytest.raises(reweft.UnsupportedError, match=message):
            rt.load_into(module, {key: torch.ones_like(value) for key, value in before.items()}, mode="swap")
        assert_equal(values(module), before)
    assert view.numel() == 4
    assert reference() is watched.bias
    del view, reference
    rt.load_into(viewed, {key: torch.ones_like(value) for key, value in viewed.state_dict().items()}, mode="swap")


def test_a_backward_pass_to_come_fails_after_a_swap() -> None:
    net = nn.Linear(3, 2)
    loss = net(torch.rand(1, 3)).sum()
    rt.load_into(net, nn.Linear(3, 2).state_dict(), mode="swap")
    with pytest.raises(RuntimeError, match="poisoned"):
        loss.backward()


class QuantizedWeight(torch.Tensor):
    """The subclass of torch's tutorial on `swap_tensors`, as printed there."""

    @staticmethod
    def __new__(cls: type[Self], elem: torch.Tensor, scale: float) -> Self:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            dtype=elem.dtype,
            layout=elem.layout,
            device=elem.device,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
        )

    def __init__(self, elem: torch.Tensor, scale: float) -> None:
        self.elem = elem
        self.scale = scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {aten.detach.default, aten._to_copy.default}:
            return cls(func(args[0].elem, *args[1:], **(kwargs or {})), args[0].scale)
        raise NotImplementedError(f"Unsupported function {func}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.module_load:
            dest, src = args[0], args[1]
            assert type(dest) is cls
            assert type(src) is torch.Tensor
            if src.isnan().any():
                raise ValueError("not a number")
            return QuantizedWeight(src, dest.scale)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantised(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight = nn.Parameter(QuantizedWeight(module.weight.detach(), 0.5), requires_grad=False)


@pytest.mark.parametrize("kind", ["state_dict", "pt", "safetensors"])
def test_the_quantised_weight_of_the_tutorial(kind: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = nn.Linear(3, 5)
        net.apply(quantised)
    weight, bias = net.weight, net.bias
    state = nn.Linear(3, 5).state_dict()
    rt.load_into(net, state if kind == "state_dict" else save(state, tmp_path, kind), mode="swap")
    assert net.weight is weight
    assert net.bias is bias
    assert isinstance(net.weight, QuantizedWeight)
    assert torch.equal(net.weight.elem, state["weight"])
    assert net.weight.scale == 0.5
    assert torch.equal(net.bias, state["bias"])
    assert isinstance(net.bias, nn.Parameter)


def test_a_handler_that_fails_half_way_changes_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    quantised(net[0])
    quantised(net[2])
    elems = [net[0].weight.elem.clone(), net[1].weight.detach().clone(), net[2].weight.elem.clone()]
    objects = [id(p) for p in net.parameters()]
    state = {key: torch.ones(2, 2) if "weight" in key else torch.ones(2) for key, _ in net.named_parameters()}
    state["2.weight"][0, 0] = float("nan")
    with pytest.raises(reweft.MismatchError, match="not a number"):
        rt.load_into(net, state, mode="swap")
    assert [id(p) for p in net.parameters()] == objects
    assert isinstance(net[0].weight, QuantizedWeight)
    found = [net[0].weight.elem, net[1].weight, net[2].weight.elem]
    assert all(torch.equal(one, other) for one, other in zip(found, elems, strict=True))
    state["2.weight"][0, 0] = 1
    rt.load_into(net, state, mode="swap")
    assert torch.equal(net[2].weight.elem, torch.ones(2, 2))


@pytest.mark.parametrize("mode", ["copy", "assign"])
def test_subclasses_are_not_replaced_by_plain_tensors(mode: Any) -> None:
    net = nn.Linear(3, 5)
    quantised(net)
    with pytest.raises(reweft.UnsupportedError, match=r"'weight': found a Tensor, wanted a QuantizedWeight(.|\n)*swap"):
        rt.load_into(net, nn.Linear(3, 5).state_dict(), mode=mode)
    plain = nn.Linear(3, 5)
    with pytest.raises(reweft.UnsupportedError, match="'weight': found a QuantizedWeight, wanted a Tensor"):
        rt.load_into(plain, {"weight": net.weight, "bias": net.bias}, mode=mode)
    assert isinstance(net.weight, QuantizedWeight)


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["copy", "assign", "swap"])
def test_distributed_tensors(mode: Any, mesh: Any) -> None:
    net = nn.Linear(3, 2)
    state = {key: torch.ones_like(value) for key, value in net.state_dict().items()}
    for name, parameter in list(net.named_parameters()):
        placed = DTensor.from_local(parameter.detach().clone(), mesh, [Replicate()])
        setattr(net, name, nn.Parameter(placed))
    before = net.weight.to_local().clone()
    with pytest.raises(reweft.UnsupportedError, match="'weight': found a Tensor, wanted a DTensor"):
        rt.load_into(net, state, mode=mode)
    assert isinstance(net.weight, DTensor)
    assert torch.equal(net.weight.to_local(), before)
    if mode != "swap":
        rt.load_into(
            net, {key: DTensor.from_local(value, mesh, [Replicate()]) for key, value in state.items()}, mode=mode
        )
        assert isinstance(net.weight, DTensor)
        assert torch.equal(net.weight.to_local(), state["weight"])


def test_fully_sharded_modules(mesh: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = {key: torch.rand_like(value) for key, value in net.state_dict().items()}
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    x = torch.rand(2, 4)
    before = net(x)
    for mode in ("copy", "assign"):
        with pytest.raises(reweft.ReweftError):
            rt.load_into(net, state, mode=mode)
        assert all(isinstance(p, DTensor) for p in net.parameters())
    assert torch.equal(net(x), before)
    placed = {key: DTensor.from_local(value, mesh, net.state_dict()[key].placements) for key, value in state.items()}
    rt.load_into(net, placed)
    wanted = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wanted.load_state_dict(state)
    assert torch.equal(net(x), wanted(x))
