"""numpy arrays inside checkpoints: read as tensors, with the values, shape, strides and order that numpy gives."""

from __future__ import annotations

import pickle
import sys
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

import reweft
from support import assert_says, raw, save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

RECONSTRUCT: Any = np.empty(0).__reduce__()[0]

DTYPES = ["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]

BASE = np.arange(24).reshape(2, 3, 4)

LAYOUTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "c": lambda array: array,
    "fortran": np.asfortranarray,
    "transposed": lambda array: array.transpose(1, 2, 0),
    "permuted": lambda array: array.transpose(1, 2, 0).copy(order="K"),
    "every_second": lambda array: array[:, ::2],
    "reversed": lambda array: array[::-1],
    "scalar": lambda array: array[1, 1, 1:2].reshape(()),
    "empty": lambda array: array[:0],
    "row": lambda array: array[0, 0],
}


def dump(value: object, path: Path, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301  (made by this test)


def assert_array(info: reweft.TensorInfo, wanted: NDArray[Any]) -> None:
    """Same type, shape and layout; the values in the machine's order."""
    assert info.dtype == wanted.dtype.name
    assert info.shape == wanted.shape
    if wanted.size:
        assert info.strides == tuple(stride // wanted.itemsize for stride in wanted.strides)
    native = np.ascontiguousarray(wanted.astype(wanted.dtype.newbyteorder("<")))
    assert bytes(info.read()) == native.tobytes()
    assert np.array_equal(info.numpy(), wanted)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(dtype: str, order: str, protocol: int, tmp_path: Path) -> None:
    value = BASE.astype(np.dtype(order + dtype))
    path = dump({"w": value, "t": value.T.copy(order="F")}, tmp_path / "x.pkl", protocol)
    wanted = load(path)
    for mmap in (False, True):
        checkpoint = reweft.open(path, mmap=mmap)
        assert (list(checkpoint), checkpoint.unreadable, checkpoint.unknown_globals) == (["w", "t"], {}, [])
        for key, array in wanted.items():
            assert_array(checkpoint[key], array)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, protocol: int, tmp_path: Path) -> None:
    path = dump({"w": LAYOUTS[layout](BASE.astype("f4"))}, tmp_path / "x.pkl", protocol)
    for mmap in (False, True):
        assert_array(reweft.open(path, mmap=mmap)["w"], load(path)["w"])


@given(
    value=st_np.arrays(st.sampled_from(DTYPES).map(np.dtype), st_np.array_shapes(min_dims=0, max_dims=5, min_side=0))
)
@settings(max_examples=60, deadline=None)
def test_any_array_in_any_protocol(tmp_path_factory: pytest.TempPathFactory, value: NDArray[Any]) -> None:
    folder = tmp_path_factory.mktemp("arrays")
    for protocol in (2, 3, 4, 5):
        info = reweft.open(dump([value], folder / "x.pkl", protocol))["0"]
        assert info.read() == np.ascontiguousarray(value).tobytes()
        assert info.shape == value.shape


def test_inside_a_checkpoint_of_torch(tmp_path: Path) -> None:
    """`torch.save` pickles them with protocol 2, where bytes are text."""
    value = np.frombuffer(bytes(range(256)), dtype="f4")
    wanted = {"w": torch.ones(2), "a": value, "rng": ("MT19937", np.arange(4, dtype="u4"), 624)}
    for zipped in (True, False):
        path = tmp_path / "x.pt"
        torch.save(wanted, path, _use_new_zipfile_serialization=zipped)
        checkpoint = reweft.open(path)
        assert list(checkpoint) == ["w", "a", "rng.1"]
        assert bytes(checkpoint["a"].read()) == value.tobytes()
        assert bytes(checkpoint["w"].read()) == raw(wanted["w"])  # type: ignore[arg-type]
        assert_array(checkpoint["rng.1"], np.arange(4, dtype="u4"))
        assert checkpoint.non_tensors == {"rng.0": 'str "MT19937"', "rng.2": "int 624"}


def test_model_zoo_file_converts(tmp_path: Path) -> None:
    """A dict of arrays beside texts, as detectron2 keeps its models."""
    model = {f"backbone.{i}.weight": np.random.default_rng(i).standard_normal((3, 4)).astype("f4") for i in range(5)}
    path = dump({"model": model, "__author__": "somebody", "matching_heuristics": True}, tmp_path / "m.pkl", 2)
    checkpoint = reweft.open(path, top_level_key="model")
    reweft.convert(checkpoint, tmp_path / "m.safetensors")
    read = reweft.open(tmp_path / "m.safetensors")
    assert set(read) == set(model)
    for key, array in model.items():
        assert_array(read[key], array)


def test_bytes_of_an_array_are_a_window_of_the_file(tmp_path: Path) -> None:
    path = dump({"w": np.arange(1000.0)}, tmp_path / "x.pkl", 4)
    info = reweft.open(path, mmap=True)["w"]
    one, other = info.numpy(), info.numpy()
    assert not one.flags.owndata
    assert one.__array_interface__["data"] == other.__array_interface__["data"]


def test_one_array_under_two_keys_is_one_storage(tmp_path: Path) -> None:
    value = np.arange(3.0)
    for protocol in (2, 5):
        checkpoint = reweft.open(dump({"a": value, "b": value, "c": value.copy()}, tmp_path / "x.pkl", protocol))
        assert checkpoint["a"].storage == checkpoint["b"].storage != checkpoint["c"].storage


def test_arrays_that_are_no_tensors_are_values(tmp_path: Path) -> None:
    value = {
        "names": np.array(["cat", "dog"]),
        "raw": np.array([b"ab"]),
        "when": np.array(["2024-01-01"], dtype="M8[D]"),
        "objects": np.array([1, "x", None], dtype=object),
        "best": np.float32(0.25),
        "steps": np.int64(-3),
        "flag": np.True_,
    }
    checkpoint = reweft.open(dump(value, tmp_path / "x.pkl", 4))
    assert (len(checkpoint), checkpoint.unreadable, checkpoint.unknown_globals) == (0, {}, [])
    assert checkpoint.non_tensors == {
        "names": "numpy array of <U3 [2]",
        "raw": "numpy array of |S2 [1]",
        "when": "numpy array of <M8[D] [1]",
        "objects": "numpy array of object [3]",
        "best": "numpy float32 0.25",
        "steps": "numpy int64 -3",
        "flag": "numpy bool True",
    }


def test_arrays_that_may_be_weights_and_cannot_be_read_are_named(tmp_path: Path) -> None:
    value = {
        "record": np.zeros(2, dtype=[("x", "f4"), ("y", "i4")]),
        "wide": np.zeros(2, dtype=np.longdouble),
        "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
        "ragged": np.array([np.ones(2), np.ones(3)], dtype=object),
        "good": np.ones(1),
    }
    checkpoint = reweft.open(dump(value, tmp_path / "x.pkl", 4))
    assert list(checkpoint) == list(value)
    why = checkpoint.unreadable
    assert set(why) == {"record", "wide", "masked", "ragged"}
    assert "structured, with the fields x, y" in why["record"]
    assert "<f16" in why["wide"]
    assert "masked" in why["masked"]
    assert "object [2]" in why["ragged"]
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.convert(checkpoint, tmp_path / "x.safetensors")
    assert_says(error, "record", "structured")


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # numpy says it of its matrices
def test_matrix_is_read_with_a_notice(tmp_path: Path) -> None:
    checkpoint = reweft.open(dump({"m": np.matrix([[1.0, 2.0]])}, tmp_path / "x.pkl", 4))
    assert_array(checkpoint["m"], np.array([[1.0, 2.0]]))
    (notice,) = checkpoint.notices
    assert "matrix" in notice


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensor_of_another_device_that_travels_as_an_array(protocol: int, tmp_path: Path) -> None:
    class Fake:
        def __init__(self, array: NDArray[Any], dtype: torch.dtype) -> None:
            self.parts = (array, dtype, "cpu", False)

        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_device_tensor_from_numpy, self.parts

    values = np.array([1.0, -2.5, 3.1415926], dtype="f4")
    saved = {
        "f": Fake(values, torch.float32),
        "t": Fake(np.asfortranarray(BASE.astype("f4")), torch.float32),
        "b": Fake(values, torch.bfloat16),
        "i": Fake(np.arange(3), torch.int64),
    }
    torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol)
    wanted = torch.load(tmp_path / "x.pt", weights_only=False)
    checkpoint = reweft.open(tmp_path / "x.pt")
    assert (list(checkpoint), checkpoint.unreadable) == (list(wanted), {})
    for key, tensor in wanted.items():
        info = checkpoint[key]
        assert (info.dtype, info.shape, info.strides) == (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.stride(),
        )
        assert bytes(info.read()) == raw(tensor)
    save({"w": Fake(values, torch.int8)}, tmp_path / "y.pt")
    assert "another dtype" in reweft.open(tmp_path / "y.pt").unreadable["w"]


@pytest.fixture
def bfloat16() -> Iterator[type]:
    """A stand-in for the module `ml_dtypes`, whose dtypes numpy pickles by class."""
    module = types.ModuleType("ml_dtypes")
    kind = type("bfloat16", (), {"__module__": "ml_dtypes", "__qualname__": "bfloat16"})
    module.bfloat16 = kind  # type: ignore[attr-defined]
    sys.modules["ml_dtypes"] = module
    yield kind
    del sys.modules["ml_dtypes"]


def test_dtype_of_ml_dtypes(bfloat16: type, tmp_path: Path) -> None:
    class Named:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.dtype, (bfloat16, False, True), (3, "<", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            state = (1, (2,), Named(), False, b"\x80\x3f\x00\x40")
            return RECONSTRUCT, (np.ndarray, (0,), b"b"), state

    info = reweft.open(dump({"w": Array()}, tmp_path / "x.pkl", 4))["w"]
    assert (info.dtype, info.shape, bytes(info.read())) == ("bfloat16", (2,), b"\x80\x3f\x00\x40")


C_ORDER = False


class Lying:
    """An array with the given state."""

    def __init__(self, *state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return RECONSTRUCT, (np.ndarray, (0,), b"b"), self.state


LIES = {
    "short": Lying(1, (3,), np.dtype("f4"), C_ORDER, bytes(8)),
    "long": Lying(1, (1,), np.dtype("f4"), C_ORDER, bytes(8)),
    "overflow": Lying(1, (2**62, 2**62), np.dtype("f4"), C_ORDER, bytes(8)),
    "negative": Lying(1, (-1,), np.dtype("f4"), C_ORDER, bytes(8)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", LIES)
def test_array_that_contradicts_itself_is_an_error(name: str, protocol: int, tmp_path: Path) -> None:
    path = dump({"fine": np.ones(1), "w": LIES[name]}, tmp_path / "x.pkl", protocol)
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, '"w"')


@pytest.mark.parametrize(
    "state", [(), (2, (1,), np.dtype("f4"), C_ORDER, bytes(4)), (1, (1,), "f4", C_ORDER, bytes(4))]
)
def test_array_with_an_unknown_state_is_unreadable(state: tuple[object, ...], tmp_path: Path) -> None:
    checkpoint = reweft.open(dump({"w": Lying(*state)}, tmp_path / "x.pkl", 4))
    assert set(checkpoint.unreadable) == {"w"}


def test_arrays_that_share_a_text_share_its_bytes_in_memory(tmp_path: Path) -> None:
    """A million arrays over one text of a megabyte would be a terabyte."""
    data = bytes(1 << 16)
    path = dump([Lying(1, (1 << 16,), np.dtype("u1"), C_ORDER, data) for _ in range(20_000)], tmp_path / "x.pkl", 2)
    checkpoint = reweft.open(path)
    assert len(checkpoint) == 20_000
    assert bytes(checkpoint["19999"].read()) == data
