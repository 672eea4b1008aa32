"""What reweft reads of a `.pt` is what `torch.load` reads: keys, dtypes, layouts, sharing and every byte."""

from __future__ import annotations

import io
import itertools
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.serialization import config

import reweft
from reweft.torch import tensor as to_torch
from support import assert_says, raw, save, storage_of, without_crc

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Every dtype of rust/reweft/src/dtype.rs that torch can save in a dense tensor.
DTYPES = [
    "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "complex32", "complex64",
    "complex128", "bool", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz",
    "float8_e8m0fnu", "uint16", "uint32", "uint64", "float4_e2m1fn_x2", "bits1x8", "bits2x4", "bits4x2", "bits8",
    "bits16",
]  # fmt: skip


def of_dtype(name: str, numel: int) -> torch.Tensor:
    """Elements of arbitrary bits, but for bool, whose bytes are 0 and 1."""
    dtype: torch.dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(numel)
    if dtype == torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).to(torch.bool)
    noise = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return noise.view(dtype)


def flatten(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Tensors of nested containers under dotted keys."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found.update(flatten(item, f"{path}.{key}" if path else str(key)))
    return found


def assert_parity(path: Path, *, weights_only: bool = True) -> reweft.Checkpoint:
    """Compare everything that can be compared, by both ways of reading."""
    wanted = flatten(torch.load(path, weights_only=weights_only))
    for mmap in (False, True):
        checkpoint = reweft.open(path, mmap=mmap)
        assert checkpoint.unreadable == {}
        assert list(checkpoint) == list(wanted)
        for key, value in wanted.items():
            info = checkpoint[key]
            assert info.dtype == str(value.dtype).removeprefix("torch."), key
            assert info.shape == tuple(value.shape), key
            assert info.strides == value.stride(), key
            assert info.storage_offset == value.storage_offset(), key
            assert info.nbytes == value.numel() * value.element_size(), key
            assert bytes(info.read()) == raw(value), key
        for (key, one), (other_key, other) in itertools.combinations(wanted.items(), 2):
            if one.untyped_storage().nbytes() and other.untyped_storage().nbytes():
                shared = checkpoint[key].storage == checkpoint[other_key].storage
                assert shared == (storage_of(one) == storage_of(other)), (key, other_key)
    return checkpoint


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(dtype: str, tmp_path: Path) -> None:
    value = of_dtype(dtype, 12)
    path = save({"flat": value, "table": value.view(3, 4), "scalar": value[5], "empty": value[:0]}, tmp_path / "x.pt")
    checkpoint = assert_parity(path)
    assert raw(to_torch(checkpoint["table"])) == raw(value)
    assert to_torch(checkpoint["scalar"]).dtype == value.dtype
    assert to_torch(checkpoint["empty"]).shape == (0,)


def test_every_name_of_the_dtype_table_is_tested_or_cannot_be_saved() -> None:
    """Fails when torch gains a dtype, so that somebody decides what to do about it."""
    cannot = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}
    cannot |= {"bcomplex32"}  # new in 2.15; listed as unreadable, see below
    cannot |= {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
    known = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert known - cannot == set(DTYPES)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "scalar": lambda: torch.tensor(3.5),
    "one": lambda: torch.tensor([[2.5]]),
    "empty": lambda: torch.empty(0),
    "empty_in_the_middle": lambda: torch.empty(2, 0, 3),
    "transposed": lambda: torch.randn(3, 4).t(),
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_of_one_channel": lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "expanded_scalar": lambda: torch.tensor(1.5).expand(2, 2),
    "slice": lambda: torch.randn(10, 4)[3:7],
    "columns": lambda: torch.randn(10, 4)[:, 1:3],
    "every_second": lambda: torch.randn(10)[1::2],
    "diagonal": lambda: torch.randn(5, 5).diagonal(),
    "windows": lambda: torch.randn(9).unfold(0, 3, 1),
    "transposed_slice": lambda: torch.randn(6, 7)[1:4, 2:6].transpose(0, 1),
    "many_dims": lambda: torch.randn([1, 2] * 6).transpose(1, 11),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, tmp_path: Path) -> None:
    assert_parity(save({"x": LAYOUTS[layout]()}, tmp_path / "x.pt"))


def test_a_bare_tensor_is_named(tmp_path: Path) -> None:
    value = torch.randn(2, 3)
    checkpoint = reweft.open(save(value, tmp_path / "x.pt"))
    assert list(checkpoint) == ["tensor"]
    assert bytes(checkpoint["tensor"].read()) == raw(value)


def test_shared_storages(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {
        "whole": base, "row": base[1], "transposed": base.t(), "flat": base.view(-1)[3:], "same": base,
        "copy": base.clone(),
    }  # fmt: skip
    checkpoint = assert_parity(save(state, tmp_path / "x.pt"))
    assert len({checkpoint[key].storage for key in state}) == 2


def test_tied_weights_and_parameters(tmp_path: Path) -> None:
    embedding = nn.Embedding(5, 4)
    head = nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    module = nn.Sequential(embedding, head)
    assert_parity(save(module.state_dict(), tmp_path / "state.pt"))
    checkpoint = assert_parity(save(dict(module.named_parameters(remove_duplicate=False)), tmp_path / "p.pt"))
    assert checkpoint["0.weight"].storage == checkpoint["1.weight"].storage


def test_parameter_with_attributes(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(2, 3))
    weight.note = "kept by torch"  # type: ignore[attr-defined]
    assert_parity(save({"w": weight}, tmp_path / "x.pt"))


def test_state_dict_is_an_ordered_dict_with_metadata(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    assert isinstance(state, OrderedDict)
    checkpoint = assert_parity(save(state, tmp_path / "x.pt"))
    assert checkpoint.format == "torch zip"
    assert checkpoint.notices == []
    assert checkpoint.unknown_globals == []


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """What a training loop saves, with the optimizer after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    return save(
        {
            "epoch": 7,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "ema": [torch.randn(2), (torch.randn(3), torch.randn(()))],
            "by_number": {0: torch.ones(2), -1: torch.zeros(2)},
            "best": 0.5,
            "name": "Übung 1",
            "flags": {"amp": True, "clip": None},
            "big": 1 << 80,
            "shape": torch.Size([1, 2]),
            "device": torch.device("cpu"),
            "kind": torch.float16,
        },
        tmp_path / "epoch7.pt",
    )


def test_training_checkpoint(training: Path) -> None:
    checkpoint = assert_parity(training)
    assert "optimizer_state_dict.state.0.exp_avg" in checkpoint
    assert "optimizer_state_dict.state.0.step" in checkpoint
    assert "ema.1.1" in checkpoint
    assert "by_number.-1" in checkpoint
    others = checkpoint.non_tensors
    assert others["epoch"] == "int 7"
    assert {"best", "name", "flags.amp", "flags.clip", "big", "shape", "device", "kind"} <= set(others)
    assert "scheduler_state_dict.T_max" in others
    assert "optimizer_state_dict.param_groups.0.lr" in others


def test_top_level_key_gives_the_state_dict_as_torch_does(training: Path) -> None:
    wanted = torch.load(training)["model_state_dict"]
    checkpoint = reweft.open(training, top_level_key="model_state_dict")
    assert list(checkpoint) == list(wanted)
    assert all(bytes(checkpoint[key].read()) == raw(value) for key, value in wanted.items())
    nested = reweft.open(training, top_level_key="optimizer_state_dict.state.1")
    assert set(nested) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    state = {"w": torch.randn(3), "b": {"long" * 100: torch.randn(2, 2)}, "n": 3, "bytes": b"\x00\xff"}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    assert_parity(tmp_path / "x.pt", weights_only=False)


def test_without_crc_is_read_with_a_notice(tmp_path: Path) -> None:
    checkpoint = assert_parity(without_crc({"w": torch.randn(3)}, tmp_path / "x.pt"))
    assert any("no CRC" in notice for notice in checkpoint.notices)


@pytest.mark.parametrize("alignment", [1, 4096])
def test_storage_alignment(alignment: int, tmp_path: Path) -> None:
    state = {"a": torch.randn(3), "b": torch.ones(1, dtype=torch.uint8), "c": torch.randn(5)}
    with config.patch({"save.storage_alignment": alignment}):  # type: ignore[attr-defined]
        path = save(state, tmp_path / "x.pt")
    assert_parity(path)


def test_saved_to_memory_and_written_under_another_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.randn(3)}, buffer)
    path = tmp_path / "no extension ü"
    path.write_bytes(buffer.getvalue())
    assert_parity(path)


def test_other_containers(tmp_path: Path) -> None:
    lists: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    lists["a"].append(torch.randn(2))
    state = {"lists": lists, "empty": {}, "none": None, "nested": {"deep": {"deeper": [[torch.randn(1)]]}}}
    assert_parity(save(state, tmp_path / "x.pt"), weights_only=False)


def test_empty_text_is_a_key_like_any_other(tmp_path: Path) -> None:
    assert_parity(save({"": torch.randn(2), "tensor": torch.randn(3)}, tmp_path / "x.pt"))


def test_a_container_that_holds_itself_ends(tmp_path: Path) -> None:
    state: dict[str, object] = {"w": torch.randn(2)}
    state["self"] = state
    checkpoint = reweft.open(save(state, tmp_path / "x.pt"))
    assert list(checkpoint) == ["w"]
    assert "self" in checkpoint.non_tensors


def test_a_file_that_torch_holds_to_be_mapped(tmp_path: Path) -> None:
    """`torch.load(mmap=True)` and ours are two views of the same bytes."""
    value = torch.randn(1000)
    path = save({"w": value}, tmp_path / "x.pt")
    theirs = torch.load(path, mmap=True)["w"].numpy()
    assert np.array_equal(reweft.open(path, mmap=True)["w"].numpy(), theirs)


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


class Holder:
    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside


UNREADABLE: dict[str, Callable[[], object]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "named_tuple": lambda: Pair(torch.randn(1), torch.randn(1)),
    "object": lambda: Holder(torch.randn(1)),
    "set": lambda: {torch.randn(1)},
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls these kinds experimental
def test_what_cannot_be_read_is_listed_and_refused_by_key(kind: str, tmp_path: Path) -> None:
    path = save({"plain": torch.ones(2), kind: UNREADABLE[kind]()}, tmp_path / "x.pt")
    checkpoint = reweft.open(path)
    assert list(checkpoint) == ["plain", kind]
    assert set(checkpoint.unreadable) == {kind}
    assert bytes(checkpoint["plain"].read()) == raw(torch.ones(2))
    with pytest.raises(reweft.UnsupportedError) as error:
        _ = checkpoint[kind]
    assert_says(error, path, kind)
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.convert(path, tmp_path / "x.safetensors")
    assert_says(error, path, kind)
    assert not (tmp_path / "x.safetensors").exists()


def test_an_unknown_object_without_tensors_is_a_value(tmp_path: Path) -> None:
    path = save({"w": torch.ones(1), "cls": Holder, "names": np.array(["x"])}, tmp_path / "x.pt")
    checkpoint = reweft.open(path)
    assert list(checkpoint) == ["w"]
    assert {"cls", "names"} == set(checkpoint.non_tensors)
    assert any(name.endswith(".Holder") for name in checkpoint.unknown_globals)


def test_keys_that_flatten_to_one_name_are_refused(tmp_path: Path) -> None:
    path = save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(reweft.KeyCollisionError) as error:
        reweft.open(path)
    assert_says(error, path, "a.b")


def test_an_absent_key_suggests_the_nearest(tmp_path: Path) -> None:
    checkpoint = reweft.open(save({"fc.weight": torch.ones(1)}, tmp_path / "x.pt"))
    with pytest.raises(KeyError) as error:
        _ = checkpoint["fc.wieght"]
    assert "fc.weight" in str(error.value)
    assert "fc.wieght" not in checkpoint
    assert checkpoint.get("fc.wieght") is None
