"""Tensors that are more, or less, than a window of a storage: parity with `torch.load`, part by part."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import reweft
from support import assert_says, raw, save

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def assert_holds(checkpoint: reweft.Checkpoint, wanted: Mapping[str, torch.Tensor]) -> None:
    assert checkpoint.unreadable == {}
    for key, value in wanted.items():
        info = checkpoint[key]
        assert (info.dtype, info.shape) == (str(value.dtype).removeprefix("torch."), tuple(value.shape)), key
        assert bytes(info.read()) == raw(value), key


class TestMeta:
    def test_dtype_and_shape_are_told_and_reading_is_an_error(self, tmp_path: Path) -> None:
        path = save({"m": torch.empty(3, 4, device="meta"), "w": torch.ones(1)}, tmp_path / "x.pt")
        checkpoint = reweft.open(path)
        assert list(checkpoint) == ["m", "w"]
        assert checkpoint.unreadable == {"m": "it is a meta tensor of float32 [3, 4], which has no data"}
        with pytest.raises(reweft.UnsupportedError) as error:
            checkpoint["m"]
        assert_says(error, path, "m", "float32 [3, 4]")

    def test_module_on_the_meta_device(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            module = nn.Linear(2, 3)
        checkpoint = reweft.open(save(module.state_dict(), tmp_path / "x.pt"))
        assert set(checkpoint.unreadable) == {"weight", "bias"}

    def test_conversion_is_refused(self, tmp_path: Path) -> None:
        path = save({"m": torch.empty(3, device="meta")}, tmp_path / "x.pt")
        with pytest.raises(reweft.UnsupportedError, match="meta tensor"):
            reweft.convert(path, tmp_path / "x.safetensors")


class TestAttributes:
    @pytest.mark.parametrize("kind", ["tensor", "parameter"])
    def test_attributes_of_a_tensor_are_kept(self, kind: str, tmp_path: Path) -> None:
        value: Any = torch.arange(3.0) if kind == "tensor" else nn.Parameter(torch.arange(3.0))
        value.note, value.scale = "text", torch.full((2,), 0.5)
        path = save({"w": value}, tmp_path / "x.pt")
        loaded = torch.load(path)["w"]
        checkpoint = reweft.open(path)
        assert list(checkpoint) == ["w", "w.scale"]
        assert_holds(checkpoint, {"w": loaded, "w.scale": loaded.scale})
        assert checkpoint.non_tensors == {"w.note": 'str "text"'}

    def test_tensor_alone(self, tmp_path: Path) -> None:
        value: Any = torch.ones(2)
        value.scale = torch.zeros(1)
        checkpoint = reweft.open(save(value, tmp_path / "x.pt"))
        assert list(checkpoint) == ["tensor", "tensor.scale"]

    def test_attribute_that_holds_its_own_tensor(self, tmp_path: Path) -> None:
        value: Any = torch.ones(2)
        value.scales = [torch.zeros(1)]
        checkpoint = reweft.open(save({"w": value, "v": value}, tmp_path / "x.pt"))
        assert list(checkpoint) == ["w", "w.scales.0", "v", "v.scales.0"]
        assert checkpoint["w"].storage == checkpoint["v"].storage

    def test_attribute_and_key_of_one_name(self, tmp_path: Path) -> None:
        value: Any = torch.ones(2)
        value.scale = torch.zeros(1)
        path = save({"w": value, "w.scale": torch.ones(1)}, tmp_path / "x.pt")
        with pytest.raises(reweft.KeyCollisionError, match=r"w\.scale"):
            reweft.open(path)

    def test_buffers_have_none(self, tmp_path: Path) -> None:
        checkpoint = reweft.open(save({"b": nn.Buffer(torch.ones(2))}, tmp_path / "x.pt"))
        assert_holds(checkpoint, {"b": torch.ones(2)})
        assert checkpoint.non_tensors == {}


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype
def test_jagged_tensor(tmp_path: Path) -> None:
    value: Any = torch.nested.nested_tensor([torch.ones(2, 3), torch.full((4, 3), 2.0)], layout=torch.jagged)
    checkpoint = reweft.open(save({"w": value}, tmp_path / "x.pt"))
    assert_holds(checkpoint, {"w.values": value.values(), "w.offsets": value.offsets()})
    assert checkpoint.non_tensors["w"] == "jagged nested tensor"
    assert checkpoint.non_tensors["w._ragged_idx"] == "int 1"
    assert not [key for key in checkpoint if key.startswith("w._values")]
    assert checkpoint.unknown_globals == []


@pytest.fixture
def mesh() -> Iterator[Any]:
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # whatever a process group of one says
def test_distributed_tensor(mesh: Any, tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    state = {
        "w": distribute_tensor(whole, mesh, [Shard(1)]),
        "p": nn.Parameter(distribute_tensor(whole + 1, mesh, [Replicate()])),
    }
    checkpoint = reweft.open(save(state, tmp_path / "x.pt"))
    assert list(checkpoint) == ["w._local_tensor", "p._local_tensor"]
    assert_holds(checkpoint, {"w._local_tensor": whole, "p._local_tensor": whole + 1})
    listed = checkpoint.non_tensors
    assert listed["w"] == "DTensor of float32 [2, 3]"
    assert "Shard(dim=1)" in listed["w._spec"]
    assert "Replicate()" in listed["p._spec"]
    assert '"data"' in listed["w._spec"]
    assert checkpoint.unknown_globals == []


class Pair(torch.Tensor):
    """A wrapper subclass: a tensor that is made of two others."""

    @staticmethod
    def __new__(cls: type[Pair], left: torch.Tensor, _right: torch.Tensor) -> Pair:  # noqa: PYI034
        return torch.Tensor._make_wrapper_subclass(cls, left.shape, dtype=left.dtype)

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left, self.right = left, right

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


def test_wrapper_subclass_is_there_by_its_parts(tmp_path: Path) -> None:
    pair = Pair(torch.arange(3.0), torch.ones(3))
    checkpoint = reweft.open(save({"w": pair}, tmp_path / "x.pt"))
    assert list(checkpoint) == ["w.left", "w.right"]
    assert_holds(checkpoint, {"w.left": pair.left, "w.right": pair.right})
    assert checkpoint.non_tensors["w"] == "Pair of float32 [3]"


class TestPacked:
    """Quantised integers of four bits: two a byte."""

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_integers_are_those_of_int_repr(self, tmp_path: Path) -> None:
        value = torch.quantize_per_channel(torch.randn(3, 5), torch.ones(3), torch.zeros(3), 0, torch.quint4x2)
        path = save({"w": value}, tmp_path / "x.pt")
        loaded = torch.load(path)["w"]
        assert_holds(reweft.open(path), {"w.int_repr": loaded.int_repr()})


def test_bcomplex32(tmp_path: Path) -> None:
    value = torch.arange(8, dtype=torch.uint8).view(torch.bcomplex32)
    checkpoint = reweft.open(save({"w": value}, tmp_path / "x.pt"))
    assert (checkpoint["w"].dtype, checkpoint["w"].shape) == ("bcomplex32", (2,))
    assert bytes(checkpoint["w"].read()) == bytes(range(8))


class TestKeys:
    def test_keys_that_are_no_texts(self, tmp_path: Path) -> None:
        keys: list[Any] = [True, None, 0.5, ("a", 1), ("b",), (), (("x", None), -3), 2**70]
        state = {key: torch.full((1,), float(number)) for number, key in enumerate(keys)}
        checkpoint = reweft.open(save({"s": state}, tmp_path / "x.pt"))
        assert list(checkpoint) == [f"s.{key!r}" for key in keys]
        assert [info.numpy().item() for info in checkpoint.values()] == list(range(len(keys)))

    def test_key_that_prints_like_another(self, tmp_path: Path) -> None:
        path = save({True: torch.ones(1), "True": torch.zeros(1)}, tmp_path / "x.pt")
        with pytest.raises(reweft.KeyCollisionError, match="True"):
            reweft.open(path)

    def test_key_without_a_name(self, tmp_path: Path) -> None:
        path = save({"outer": {torch.device("cpu"): torch.ones(1)}}, tmp_path / "x.pt")
        with pytest.raises(reweft.UnsupportedError) as error:
            reweft.open(path)
        assert_says(error, path, "outer")


class TestPlainPickles:
    """Tensors that `pickle.dump` wrote: their storages are streams of their own within the pickle."""

    STATE = {"a": torch.arange(6.0).reshape(2, 3), "t": torch.arange(6).reshape(2, 3).t(), "e": torch.empty(0)}  # noqa: RUF012

    @pytest.mark.parametrize("protocol", range(6))
    def test_tensors(self, protocol: int, tmp_path: Path) -> None:
        state = {**self.STATE, "f8": torch.ones(3, dtype=torch.float8_e4m3fn), "p": nn.Parameter(torch.ones(2))}
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(state, protocol=protocol))
        for mmap in (False, True):
            checkpoint = reweft.open(path, mmap=mmap)
            assert checkpoint.format == "pickle"
            assert list(checkpoint) == list(state)
            assert_holds(checkpoint, state)
            assert checkpoint["t"].strides == (1, 3)

    def test_every_cut_is_an_error(self, tmp_path: Path) -> None:
        data = pickle.dumps({"a": torch.arange(4.0)}, protocol=4)
        for length in range(len(data)):
            (tmp_path / "x.pkl").write_bytes(data[:length])
            with pytest.raises(reweft.ReweftError):
                reweft.open(tmp_path / "x.pkl")

    def test_no_changed_byte_ends_in_a_panic(self, tmp_path: Path) -> None:
        data, refused = pickle.dumps({"a": torch.arange(4.0)}, protocol=2), 0
        for at in range(len(data)):
            changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            (tmp_path / "x.pkl").write_bytes(changed)
            try:
                reweft.open(tmp_path / "x.pkl")["a"].read()
            except (reweft.ReweftError, KeyError):
                refused += 1
        assert refused > len(data) // 2

    def test_stream_that_contradicts_its_tensor(self, tmp_path: Path) -> None:
        data = pickle.dumps({"a": torch.arange(4.0)}, protocol=4)
        at = data.rindex((4).to_bytes(8, "little"))  # the number of elements, before them
        (tmp_path / "x.pkl").write_bytes(data[:at] + (3).to_bytes(8, "little") + data[at + 8 :])
        with pytest.raises(reweft.FormatError, match=r"stand behind|3|no storage"):
            reweft.open(tmp_path / "x.pkl")

    @pytest.mark.parametrize(
        "text", ["", ".", "N.", "(see note).", "].", "}.", "(t.", "class A.", "(dp0\n.", "c.", "words (and more)."]
    )
    def test_text_is_no_pickle(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "x.txt").write_text(text)
        with pytest.raises((reweft.UnsupportedError, reweft.FormatError), match=r"no checkpoint|empty"):
            reweft.open(tmp_path / "x.txt")


def zipped(data: bytes, storage: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": data, "data/0": storage, "version": b"3\n"}.items():
            archive.writestr(f"x/{name}", content)
    return buffer.getvalue()


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0X\x30X\x03\0\0\0cpuK\x04tQ".replace(b"X\x30", b"0")
# An object of a tensor class, whose state is (storage, offset, size, stride).
OLD_TENSOR = b"ctorch\nFloatTensor\n)\x81(" + STORAGE + b"K\x00K\x02K\x02\x86K\x01K\x02\x86tb"


@pytest.mark.parametrize("kind", ["tensor", "Parameter", "Variable", "REDUCE"])
def test_objects_of_the_first_releases(kind: str, tmp_path: Path) -> None:
    """Tensors by their state `(storage, offset, size, stride)`; parameters by `(data, grad, hooks, ...)`."""
    state = b"(" + OLD_TENSOR + b"NN\x88\x89tb"
    opcodes = {
        "tensor": OLD_TENSOR,
        "Parameter": b"ctorch.nn.parameter\nParameter\n)\x81" + state,
        "Variable": b"ctorch.autograd.variable\nVariable\n)\x81" + state,
        "REDUCE": b"ctorch.nn.parameter\nParameter\n" + OLD_TENSOR + b"\x88\x86R(\x88\x89Ntb",
    }[kind]
    values = torch.arange(4.0)
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(b"\x80\x02}X\x01\0\0\0w" + opcodes + b"s.", values.numpy().tobytes()))
    checkpoint = reweft.open(path)
    assert_holds(checkpoint, {"w": values.reshape(2, 2).t()})
    if kind in {"tensor", "Parameter"}:
        assert torch.equal(torch.load(path, weights_only=False)["w"].detach(), values.reshape(2, 2).t())
