"""`reweft.load_config`: the values that pickle and torch give, without running a file."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import math
import pathlib
import pickle
import pickletools
import sys
import types
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reweft
from reweft import ConfigDict, ConfigName, ConfigObject
from support import assert_hints, assert_says

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROTOCOLS = [2, 3, 4, 5]


def dump(value: object, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def plain(value: Any) -> Any:
    """Something that compares equal only for equal types and values; NaN is NaN, and 0.0 is not -0.0."""
    made: Any = value
    if isinstance(value, dict):
        made = [(plain(key), plain(item)) for key, item in value.items()]
    elif isinstance(value, (list, tuple, collections.deque)):
        made = [plain(item) for item in value]
    elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        made = plain(vars(value))
    elif isinstance(value, (set, frozenset)):
        made = sorted((plain(item) for item in value), key=repr)
    elif isinstance(value, np.ndarray):
        # Protocol 5 alone keeps the byte order of the writer.
        strides = value.strides if value.size else ()
        made = (value.dtype.newbyteorder("="), value.shape, strides, plain(value.tolist()))
    elif isinstance(value, float):
        made = value.hex()
    elif isinstance(value, complex):
        made = (plain(value.real), plain(value.imag))
    return type(value), made


def same(left: Any, right: Any) -> bool:
    return bool(plain(left) == plain(right))


BERLIN_WINTER = dt.timezone(dt.timedelta(hours=1))

VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "ints": [0, 1, -1, 255, 256, 65535, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 2**64],
    "long": [10**40, -(10**40), 1 << 5000, -(1 << 20_000)],
    "floats": [0.0, -0.0, 0.1, 1e300, 5e-324, math.inf, -math.inf, math.nan],
    "texts": ["", "a", "\0", "é", "\U0001f600", "x" * 300, "\ud800 alone"],
    "bytes": [b"", b"\x00\xff", bytes(range(256)), b"x" * 300],
    "bytearrays": [bytearray(), bytearray(range(256))],
    "lists": [[], [1], [[]], list(range(2000))],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((),)],
    "dicts": [{}, {"a": 1}, {1: 2, "1": 3, (1, 2): 4, None: 5, True + 1: 6, 2.5: 7, b"k": 8}],
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "counter": collections.Counter("abracadabra"),
    "default": collections.defaultdict(list, {"a": [1]}),
    "default_none": collections.defaultdict(None, {"a": 1}),
    "deque": [collections.deque([1, 2, 3], maxlen=5), collections.deque()],
    "sets": [set(), {1, "a"}, frozenset(), frozenset({(1, 2), None})],
    "complex": [1j, complex(-0.0, math.inf)],
    "ranges": [range(5), range(1, 10, 3), range(10**20, 0, -1)],
    "slices": [slice(None), slice(1, 2, 3), slice("a", None)],
    "ellipsis": ...,
    "paths": [pathlib.Path("/a/b"), pathlib.PurePosixPath("x/y"), pathlib.PureWindowsPath("C:/a/b"), pathlib.Path()],
    "uuids": [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), uuid.UUID("12345678-1234-5678-1234-567812345678")],
    "dates": [dt.date(1, 1, 1), dt.date(2024, 2, 29)],
    "times": [dt.time(23, 59, 59, 999_999), dt.time(1, fold=1), dt.time(2, tzinfo=dt.UTC)],
    "datetimes": [
        dt.datetime(2024, 5, 6, 7, 8, 9, 10),  # noqa: DTZ001  (a time without a zone is what is tested)
        dt.datetime(2024, 5, 6, tzinfo=BERLIN_WINTER),
        dt.datetime(2024, 5, 6, 1, fold=1, tzinfo=dt.UTC),
        dt.datetime(2024, 5, 6, tzinfo=dt.timezone(dt.timedelta(hours=-3, minutes=-30))),
    ],
    "durations": [dt.timedelta(0), dt.timedelta(days=-1, microseconds=1), dt.timedelta(weeks=9)],
    "decimals": [decimal.Decimal("1.10"), decimal.Decimal("-Infinity"), decimal.Decimal("1E+400")],
    "namespaces": [argparse.Namespace(lr=0.1, layers=[1, 2]), types.SimpleNamespace(a=types.SimpleNamespace(b=1))],
    "numpy_scalars": [
        np.float64(0.1), np.float32(0.1), np.float16(0.5), np.int8(-1), np.uint64(2**64 - 1), np.bool_(1),
        np.complex64(1j), np.str_("abc"), np.bytes_(b"ab"), np.datetime64("2024-01-01", "D"), np.longdouble(0.1),
        np.timedelta64(3, "s"),
    ],
    "numpy_arrays": [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["a", "bcd"]), np.array([b"a", b"bcd"]), np.array(["2024-01-01", "NaT"], dtype="M8[ns]"),
        np.empty((0, 3)), np.array(5), np.array([1, "x", None, [1]], dtype=object), np.zeros(2, dtype=np.longdouble),
        np.arange(24, dtype="u1").reshape(2, 3, 4).transpose(2, 0, 1),
    ],
    "numpy_dtypes": [np.dtype("f4"), np.dtype(">i8"), np.dtype("U5"), np.dtype("M8[25s]"), np.dtype(object)],
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_pickle(name: str, protocol: int, tmp_path: Path) -> None:
    path = dump({"my_config": VALUES[name]}, tmp_path / "x.pkl", protocol)
    wanted = pickle.loads(path.read_bytes())  # noqa: S301  (made by this test)
    found = reweft.load_config(path)
    assert same(found, wanted), found
    assert same(reweft.load_config(path, top_level_key="my_config"), wanted["my_config"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_values_are_those_of_torch_load(protocol: int, zipped: bool, tmp_path: Path) -> None:  # noqa: FBT001
    saved = {"model": {"w": torch.ones(2)}, "my_config": VALUES}
    path = tmp_path / "x.pt"
    torch.save(saved, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    wanted = torch.load(path, weights_only=False)["my_config"]
    assert same(reweft.load_config(path, top_level_key="my_config"), wanted)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.decimals(allow_nan=False)
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
)
keys = st.text() | st.integers() | st.booleans() | st.none() | st.binary() | st.tuples(st.integers(), st.text())
nested = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.integers())
        | st.builds(lambda value: types.SimpleNamespace(value=value), inner)
    ),
    max_leaves=30,
)


@given(value=nested, protocol=st.sampled_from(PROTOCOLS))
@settings(max_examples=300, deadline=None)
def test_any_nested_data(tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int) -> None:
    path = dump(value, tmp_path_factory.mktemp("nested") / "x.pkl", protocol)
    assert same(reweft.load_config(path), pickle.loads(path.read_bytes()))  # noqa: S301  (made by this test)


@pytest.mark.parametrize("protocol", [2, 4])
def test_constants_of_torch_and_classes_are_names(protocol: int, tmp_path: Path) -> None:
    value = {
        "dtype": torch.bfloat16, "device": torch.device("cuda", 1), "cpu": torch.device("cpu"),
        "layout": torch.sparse_coo, "qscheme": torch.per_channel_affine,
        "class": torch.nn.GELU, "function": math.sqrt,
    }  # fmt: skip
    kinds = {"dtype": "dtype", "device": "device", "cpu": "device", "layout": "layout", "qscheme": "qscheme"}
    if protocol > 2:  # older protocols cannot say it
        value["memory_format"], kinds["memory_format"] = torch.channels_last, "memory_format"
    found = reweft.load_config(dump(value, tmp_path / "x.pkl", protocol))
    assert {key: found[key].kind for key in kinds} == kinds
    assert {key: str(found[key]) for key in kinds} == {key: str(value[key]) for key in kinds}
    assert found["class"] == ConfigName("global", "torch.nn.modules.activation.GELU")
    assert found["function"] == ConfigName("global", "math.sqrt")
    size = reweft.load_config(dump([torch.Size([2, 3])], tmp_path / "x.pkl", protocol))
    assert size == [(2, 3)]
    assert type(size[0]) is tuple


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


class Flag(enum.IntFlag):
    A = 1
    B = 2


@dataclasses.dataclass
class Plain:
    lr: float
    betas: tuple[float, float]


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


class Point(NamedTuple):
    x: int
    y: int


class Attributes(dict[str, Any]):
    """As Lightning keeps hyper-parameters."""


class Words(list[str]):
    pass


MODULE = __name__


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_instances_of_other_classes_are_data(protocol: int, tmp_path: Path) -> None:
    value = [
        Color.RED, Flag.A | Flag.B, Plain(0.1, (0.9, 0.99)), Slotted(), Point(1, 2), Attributes(a=1), Words("ab"),
        Plain,
    ]  # fmt: skip
    found = reweft.load_config(dump(value, tmp_path / "x.pkl", protocol))
    assert found[0] == ConfigObject(f"{MODULE}.Color", (1,))
    assert found[1] == ConfigObject(f"{MODULE}.Flag", (3,))
    assert found[2] == ConfigObject(f"{MODULE}.Plain", (), {"lr": 0.1, "betas": (0.9, 0.99)})
    assert found[3] == ConfigObject(f"{MODULE}.Slotted", (), {"a": 1, "b": [2]})
    assert found[4] == ConfigObject(f"{MODULE}.Point", (1, 2))
    assert found[5] == {"a": 1}
    assert isinstance(found[5], ConfigDict)
    assert (found[5].class_name, found[5].attributes) == (f"{MODULE}.Attributes", {})
    assert repr(found[5]) == f"<{MODULE}.Attributes {{'a': 1}}>"
    assert found[6] == ConfigObject(f"{MODULE}.Words", elements=["a", "b"])
    assert found[7] == ConfigName("global", f"{MODULE}.Plain")


def test_nothing_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02cthis\nmissing\n)\x81}X\x01\0\0\0aK\x01sb.")
    assert reweft.load_config(path) == ConfigObject("this.missing", (), {"a": 1})
    assert "this" not in sys.modules
    path.write_bytes(b"\x80\x02cos\nsystem\nX\x0b\0\0\0touch /nope\x85R.")
    assert reweft.load_config(path) == ConfigObject("os.system", ("touch /nope",))


@pytest.fixture
def omegaconf() -> Any:
    """Stand-ins with the classes, names and attributes of omegaconf, whose nodes refer to their parents."""
    made = {}
    for name, owner in [("DictConfig", "dictconfig"), ("ListConfig", "listconfig"), ("AnyNode", "nodes")]:
        module = types.ModuleType(f"omegaconf.{owner}")
        kind = type(name, (), {"__module__": module.__name__, "__qualname__": name})
        setattr(module, name, kind)
        sys.modules[module.__name__] = module
        made[name] = kind
    sys.modules["omegaconf"] = types.ModuleType("omegaconf")
    yield types.SimpleNamespace(**made)
    for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.listconfig", "omegaconf.nodes"):
        del sys.modules[name]


@pytest.mark.parametrize("protocol", [2, 4])
def test_omegaconf_is_what_it_contains(omegaconf: Any, protocol: int, tmp_path: Path) -> None:
    def node(kind: str, parent: Any, **state: Any) -> Any:
        made = getattr(omegaconf, kind)()
        made.__dict__.update(_metadata={"ref_type": Any}, _parent=parent, **state)
        return made

    root = node("DictConfig", None, _content={})
    root._content["lr"] = node("AnyNode", root, _val=0.1)
    root._content["sizes"] = node("ListConfig", root, _content=[])
    root._content["sizes"]._content.append(node("AnyNode", root._content["sizes"], _val="${lr}"))
    path = dump({"hyper_parameters": root}, tmp_path / "x.pkl", protocol)
    assert reweft.load_config(path) == {"hyper_parameters": {"lr": 0.1, "sizes": ["${lr}"]}}
    assert reweft.load_config(path, top_level_key="hyper_parameters.sizes.0") == "${lr}"


def test_texts_of_python_2(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}U\x04nameU\x05caf\xc3\xa9s.")
    assert reweft.load_config(path) == {"name": "café"} == pickle.loads(path.read_bytes(), encoding="utf-8")  # noqa: S301
    path.write_bytes(b"\x80\x02}U\x04nameU\x04caf\xe9s.")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.load_config(path)
    assert_says(error, path, '"name"', "Python 2", "UTF-8")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_values_are_one_object(protocol: int, tmp_path: Path) -> None:
    shared: list[Any] = [1]
    key = ("k",)
    found = reweft.load_config(dump([shared, {"again": shared}, (shared,), key, {key: 0}], tmp_path / "x", protocol))
    assert found[0] is found[1]["again"] is found[2][0]
    assert found[3] is next(iter(found[4]))


def test_sharing_that_would_explode_as_a_tree_costs_nothing(tmp_path: Path) -> None:
    value: list[Any] = ["lol"]
    for _ in range(200):
        value = [value] * 10
    found = reweft.load_config(dump(value, tmp_path / "x.pkl"))
    for _ in range(200):
        found = found[0]
    assert found == ["lol"]


def chain(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def test_a_million_levels(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(chain(1_000_000))
    found = reweft.load_config(path)
    depth = 0
    while found:
        found = found[0]
        depth += 1
    assert depth == 999_999


def make_cycle(kind: str) -> Any:
    held: Any = [] if kind == "list" else {} if kind == "dict" else types.SimpleNamespace()
    inner = [0, held]
    if kind == "list":
        held.append({"x": inner})
    elif kind == "dict":
        held["x"] = {"x": inner}
    else:
        held.x = {"x": inner}
    return {"top": held}


@pytest.mark.parametrize("kind", ["list", "dict", "namespace"])
def test_a_value_that_holds_itself_is_an_error(kind: str, tmp_path: Path) -> None:
    path = dump(make_cycle(kind), tmp_path / "x.pkl")
    with pytest.raises(reweft.FormatError) as error:
        reweft.load_config(path)
    assert_says(error, path, '"top"', "holds itself")
    assert error.value.key == "top"


def test_tensors_are_refused_by_path_unless_they_are_not_selected(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"cfg": {"a": 1}, "args": argparse.Namespace(nested=[0, {"w": torch.ones(1)}])}, path)
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.load_config(path)
    assert_says(error, path, '"args.nested.1.w"', "tensor")
    assert error.value.key == "args.nested.1.w"
    assert_hints(error)
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.load_config(path, top_level_key="args.nested")
    assert error.value.key == "args.nested.1.w"
    assert reweft.load_config(path, top_level_key="cfg") == {"a": 1}
    assert reweft.load_config(path, top_level_key="args.nested.0") == 0


def test_an_absent_key_says_what_there_is(tmp_path: Path) -> None:
    path = dump({"my_config": {"n_head": 2}, "model": {}}, tmp_path / "x.pkl")
    with pytest.raises(reweft.NotFoundError) as error:
        reweft.load_config(path, top_level_key="my_confg")
    assert_says(error, path, "my_config, model", 'did you mean "my_config"?')
    with pytest.raises(reweft.NotFoundError):
        reweft.load_config(path, top_level_key="my_config.n_head.x")
    with pytest.raises(reweft.NotFoundError):
        reweft.load_config(path, top_level_key="")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "structured": (lambda: np.zeros(1, dtype=[("x", "f4")]), "structured, with the fields x"),
    "masked": (lambda: np.ma.masked_array([1.0], [True]), "masked_array"),
    "factory": (lambda: collections.defaultdict(Slotted), "defaultdict that makes values by"),
    "attributed": (lambda: with_attributes(collections.OrderedDict(a=1)), "attributes of its own"),
}


def with_attributes(value: Any) -> Any:
    value._metadata = {"version": 1}
    return value


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_names_its_path(name: str, tmp_path: Path) -> None:
    make, part = REFUSED[name]
    path = dump({"a": [{"b": make()}]}, tmp_path / "x.pkl")
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.load_config(path)
    assert error.value.key == "a.0.b"
    if name != "masked":
        assert_says(error, path, part)


@pytest.mark.parametrize(
    ("body", "kind", "part"),
    [
        (b"}(]K\x01u", reweft.FormatError, "unhashable"),
        (b"}(K\x01K\x02\x88K\x03u", reweft.KeyCollisionError, "twice"),
        (b"}(X\x01\0\0\0aK\x02U\x01aK\x03u", reweft.KeyCollisionError, "twice"),
        (b"cdecimal\nDecimal\nX\x02\0\0\0xx\x85R", reweft.FormatError, "Decimal"),
        (b"c__builtin__\nxrange\nK\0K\1K\0\x87R", reweft.FormatError, "zero"),
        (b"c__builtin__\nxrange\nK\0K\1\x86R", reweft.FormatError, "2 parts"),
        (b"\x82\x01", reweft.UnsupportedError, "extension"),
    ],
)
def test_lying_pickles_are_errors_with_a_path(body: bytes, kind: type[Exception], part: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}X\x01\0\0\0k" + body + b"s.")
    with pytest.raises(kind) as error:
        reweft.load_config(path)
    assert_says(error, path, '"k', part)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"\x07\xe8\x02\x1e", b"\x07\xe8\x0d\x01", b"\0\0\x01\x01", b"\x07\xe8\x01"])
def test_dates_that_do_not_exist_stay_objects(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x03cdatetime\ndate\nC" + bytes([len(text)]) + text + b"\x85R.")
    assert reweft.load_config(path) == ConfigObject("datetime.date", (text,))


def test_arrays_over_one_text_are_bounded(tmp_path: Path) -> None:
    class Array:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def __reduce__(self) -> tuple[Any, ...]:
            made: Any = np.empty(0).__reduce__()
            return made[0], made[1], (1, (len(self.data),), np.dtype("u1"), False, self.data)

    data = bytes(1 << 20)
    path = dump([Array(data) for _ in range(2000)], tmp_path / "x.pkl", 2)
    with pytest.raises(reweft.LimitError, match="max_repeated_nbytes"):
        reweft.load_config(path)


def test_other_files_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(reweft.UnsupportedError, match="safetensors"):
        reweft.load_config(path)
    path.write_bytes(pickletools.optimize(pickle.dumps([1]))[:-1])
    with pytest.raises(reweft.FormatError):
        reweft.load_config(path)
    with pytest.raises(reweft.IoError):
        reweft.load_config(tmp_path / "absent")
