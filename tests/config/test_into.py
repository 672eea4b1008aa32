"""`load_config(..., into=...)`: dataclasses and other annotated types, where nothing is converted without a word."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import pathlib
import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, NotRequired, Optional, TypedDict

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reweft
from support import assert_says

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Optim:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class Net:
    n_head: int
    name: str = "net"
    optim: Optim | None = None
    layers: list[Optim] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    extra: Any = None


def load(value: object, into: Any, folder: Path) -> Any:
    (folder / "x.pkl").write_bytes(pickle.dumps({"my_config": value}, protocol=4))
    return reweft.load_config(folder / "x.pkl", top_level_key="my_config", into=into)


def test_flat(tmp_path: Path) -> None:
    @dataclass
    class NetConfig:
        n_head: int
        n_layer: int
        d_model: int
        some_float: float
        some_int: int
        some_bool: bool
        some_str: str
        some_list_int: list[int]
        some_list_str: list[str]
        some_list_float: list[float]
        some_dict: dict[str, str]

    value = {
        "n_head": 2, "n_layer": 3, "d_model": 512, "some_float": 0.1, "some_int": 1, "some_bool": True,
        "some_str": "hello", "some_list_int": [1, 2, 3], "some_list_str": ["hello", "world"],
        "some_list_float": [0.1, 0.2], "some_dict": {"some_key": "some_value"},
    }  # fmt: skip
    path = tmp_path / "weights_with_config.pt"
    torch.save({"my_model": {"w": torch.ones(2)}, "my_config": value}, path)
    found = reweft.load_config(path, top_level_key="my_config", into=NetConfig)
    assert found == NetConfig(**value)  # type: ignore[arg-type]


def test_nested(tmp_path: Path) -> None:
    value = {"n_head": 2, "optim": {"lr": 1, "betas": [0.5, 1]}, "layers": ({"lr": 0.5},), "sizes": {"a": 1}}
    found = load(value, Net, tmp_path)
    assert found == Net(2, "net", Optim(1.0, (0.5, 1.0)), [Optim(0.5)], {"a": 1})
    assert [type(number) for number in (found.optim.lr, *found.optim.betas)] == [float] * 3
    assert load(argparse.Namespace(**value), Net, tmp_path) == found
    assert load([value], list[Net], tmp_path) == [found]


def test_an_instance_of_the_dataclass_fills_it_again(tmp_path: Path) -> None:
    saved = Net(2, optim=Optim(0.1), layers=[Optim(0.2)])
    assert load(saved, Net, tmp_path) == saved


@pytest.mark.parametrize(
    ("value", "where", "part"),
    [
        ({"n_head": 2.0}, "n_head", "float 2.0, wanted int"),
        ({"n_head": True}, "n_head", "bool True, wanted int"),
        ({"n_head": "2"}, "n_head", "str '2', wanted int"),
        ({"n_head": None}, "n_head", "NoneType, wanted int"),
        ({"n_head": 2, "name": b"x"}, "name", "bytes, wanted str"),
        ({"n_head": 2, "optim": {"lr": "x"}}, "optim.lr", "wanted float"),
        ({"n_head": 2, "optim": {"lr": 2**53 + 1}}, "optim.lr", "which no float equals"),
        ({"n_head": 2, "optim": {"lr": 10**400}}, "optim.lr", "which no float equals"),
        ({"n_head": 2, "optim": {"lr": 1, "betas": [1]}}, "optim.betas", "list of 1, wanted tuple[float, float]"),
        ({"n_head": 2, "optim": {}}, "optim.lr", "missing; Optim needs lr"),
        ({"n_head": 2, "layers": [{"lr": 1}, {"lr": 1, "lrr": 2}]}, "layers.1.lrr", "Optim has no field lrr"),
        ({"n_head": 2, "sizes": {"a": 0.5}}, "sizes.a", "wanted int"),
        ({"n_head": 2, "sizes": {1: 1}}, "sizes.key 1", "int 1, wanted str"),
        ({"n_head": 2, "layers": {"lr": 1}}, "layers", "dict, wanted list"),
        ({1: 2}, None, "the key int 1 is no name of a field"),
        ([1], None, "list, wanted Net"),
        ({}, "n_head", "missing"),
    ],
)
def test_what_does_not_fit_names_its_path(value: Any, where: str | None, part: str, tmp_path: Path) -> None:
    with pytest.raises(reweft.MismatchError) as error:
        load(value, Net, tmp_path)
    assert_says(error, tmp_path / "x.pkl", part)
    assert error.value.key == ("my_config" if where is None else f"my_config.{where}")
    assert error.value.path == tmp_path / "x.pkl"


def test_a_field_that_is_nearly_right_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(reweft.MismatchError) as error:
        load({"n_haed": 2}, Net, tmp_path)
    assert error.value.hint == "did you mean 'n_head'?"


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"


UserId = NewType("UserId", int)


class Typed(TypedDict):
    a: int
    b: NotRequired[float]


FITS: list[tuple[Any, Any, Any]] = [
    (None, None, None),
    (None, Optional[int], None),  # noqa: UP045  (the old spelling is what is tested)
    (3, int | str, 3),
    ("3", int | str, "3"),
    (3, float | int, 3),
    ([1, 2], list[int] | int, [1, 2]),
    ("a", Literal["a", "b"], "a"),
    (5, UserId, 5),
    (5, Annotated[int, "unit"], 5),
    ([1, "a"], tuple[int, str], (1, "a")),
    ((1, 2, 3), tuple[int, ...], (1, 2, 3)),
    ((), tuple[()], ()),
    ((1, 2), list[float], [1.0, 2.0]),
    ({1, 2}, frozenset[int], frozenset({1, 2})),
    ({1: "a"}, dict[int, str], {1: "a"}),
    (collections.deque([1], 3), collections.deque[int], collections.deque([1], 3)),
    (collections.OrderedDict(a=1), collections.OrderedDict[str, int], collections.OrderedDict(a=1)),
    (np.float32(0.5), float, 0.5),
    (np.int64(3), int, 3),
    (np.int64(3), float, 3.0),
    (np.bool_(1), bool, True),
    (np.str_("x"), str, "x"),
    (torch.float16, str, "torch.float16"),
    (torch.float16, torch.dtype, torch.float16),
    (torch.device("cuda:1"), torch.device, torch.device("cuda:1")),
    (torch.Size([2]), torch.Size, torch.Size([2])),
    (Color.RED, Color, Color.RED),
    (pathlib.Path("/a"), pathlib.Path, pathlib.Path("/a")),
    (dt.date(2024, 1, 2), dt.date, dt.date(2024, 1, 2)),
    (argparse.Namespace(a=1), argparse.Namespace, argparse.Namespace(a=1)),
    ({"a": 1}, Typed, {"a": 1}),
    ({"a": 1, "b": 2}, Typed, {"a": 1, "b": 2.0}),
    ([[1]], list[Any], [[1]]),
    (b"x", bytes, b"x"),
]


@pytest.mark.parametrize(("value", "kind", "wanted"), FITS, ids=[f"{case[1]}-{case[0]}" for case in FITS])
def test_types_that_fit(value: Any, kind: Any, wanted: Any, tmp_path: Path) -> None:
    found = load(value, kind, tmp_path)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, bool), (1.0, int), (True, float), ("1", float), (1, str), (1, bytes), ([1], set[int]), ({1}, list[int]),
        ("a", Literal["b"]), (1, Literal[True]), (1, Color), ("RED", Color), ({"a": 1.5}, Typed), ({"c": 1}, Typed),
        (np.longdouble(1), float), ("torch.float16", torch.dtype), ("cpu", torch.device), ({}, collections.OrderedDict),
        ("/a", pathlib.Path), ("a", list[str]), (1, int | None | str and str), (0.5, int | str), ({"a": 1}, Net),
        (1j, float), (1, complex),
    ],
)  # fmt: skip
def test_types_that_do_not_fit(value: Any, kind: Any, tmp_path: Path) -> None:
    with pytest.raises(reweft.MismatchError) as error:
        load(value, kind, tmp_path)
    assert_says(error, tmp_path / "x.pkl", "my_config")


def test_arrays(tmp_path: Path) -> None:
    array = np.arange(3, dtype="f4")
    assert np.array_equal(load(array, NDArray[np.float32], tmp_path), array)
    assert np.array_equal(load(array, np.ndarray, tmp_path), array)
    with pytest.raises(reweft.MismatchError, match="array of float32, wanted float64"):
        load(array, NDArray[np.float64], tmp_path)


@dataclass
class Checked:
    a: int

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError("a is negative")


def test_a_class_may_refuse_its_fields(tmp_path: Path) -> None:
    with pytest.raises(reweft.MismatchError, match="Checked refuses it: a is negative") as error:
        load([{"a": 1}, {"a": -1}], list[Checked], tmp_path)
    assert error.value.key == "my_config.1"


@dataclass
class Tree:
    child: Tree | None = None


def test_types_that_hold_themselves_are_bounded(tmp_path: Path) -> None:
    value: Any = None
    for _ in range(100):
        value = {"child": value}
    assert load(value, Tree, tmp_path)
    for _ in range(50):
        value = {"child": value}
    with pytest.raises(reweft.LimitError, match="128 levels"):
        load(value, Tree, tmp_path)


def test_shared_values_that_explode_as_a_tree_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reweft._into.MAX_VALUES", 10_000)
    value: Any = 1
    kind: Any = int
    for _ in range(30):
        value, kind = [value] * 10, list[kind]
    with pytest.raises(reweft.LimitError, match="10000 values"):
        load(value, kind, tmp_path)


def test_annotations_that_cannot_be_resolved_or_made_are_the_caller_s_error(tmp_path: Path) -> None:
    @dataclass
    class Lost:
        a: Missing  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(reweft.UsageError, match="Missing"):
        load({"a": 1}, Lost, tmp_path)
    with pytest.raises(reweft.UsageError, match="makes no"):
        load(1, "int", tmp_path)
