"""`reweft.diff`: what differs between two files, and by how much, as torch computes it."""

from __future__ import annotations

import argparse
import collections
import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import reweft
from reweft.torch import checkpoint_of
from support import assert_says, save, without_crc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from support import Package


def both(a: object, b: object, folder: Path, **options: Any) -> reweft.DiffReport:
    return reweft.diff(save(a, folder / "a.pt"), save(b, folder / "b.pt"), **options)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def test_a_file_equals_itself_and_its_conversion(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(4, 5).t(), "b": torch.randn(3, dtype=torch.bfloat16), "i": torch.arange(3),
        "nan": torch.tensor([math.nan, math.inf]), "flag": torch.tensor([True]), "empty": torch.empty(0, 2),
        "scalar": torch.tensor(1j), "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "last": torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }  # fmt: skip
    path = save(state, tmp_path / "a.pt")
    reweft.convert(path, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for other in (path, tmp_path / "b.safetensors", tmp_path / "c.pt"):
        report = reweft.diff(path, other)
        assert report
        assert (report.equal, report.tensors, report.changed) == (True, len(state), ())
        assert (report.only_in_a, report.only_in_b, report.unreadable, report.ties) == ((), (), (), ())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_largest_difference_of_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    a, b = torch.randn(7, 11).to(dtype), torch.randn(7, 11).to(dtype)
    (change,) = both({"w": a}, {"w": b}, tmp_path).changed
    wide = (a.double() - b.double()).abs()
    relative = wide / torch.maximum(a.double().abs(), b.double().abs())
    assert change.max_abs == wide.max().item()
    assert change.max_rel == relative[wide > 0].max().item()
    assert change.at is not None
    assert wide[change.at] == wide.max()
    assert change.differing == int(
        (a.view(torch.uint8).view(7, 11, -1) != b.view(torch.uint8).view(7, 11, -1)).any(-1).sum()
    )


@pytest.mark.parametrize("dtype", INTS, ids=str)
def test_largest_difference_of_integers_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    info = torch.iinfo(dtype)
    a = torch.tensor([info.min, info.max, 3], dtype=dtype)
    b = torch.tensor([info.max, info.max - 1, 3], dtype=dtype)
    (change,) = both({"w": a}, {"w": b}, tmp_path).changed
    assert (change.max_abs, change.at, change.differing) == (info.max - info.min, (0,), 2)
    assert type(change.max_abs) is int


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls complex32 experimental
def test_complex_and_bool(tmp_path: Path) -> None:
    a = {"c": torch.tensor([1 + 1j, 2]), "b": torch.tensor([True, False]), "h": torch.tensor([1j]).to(torch.complex32)}
    b = {"c": torch.tensor([4 + 5j, 2]), "b": torch.tensor([True, True]), "h": torch.tensor([3j]).to(torch.complex32)}
    changed = {change.key: change for change in both(a, b, tmp_path).changed}
    assert (changed["c"].max_abs, changed["c"].at) == (5.0, (0,))
    assert (changed["b"].max_abs, changed["b"].differing) == (1, 1)
    assert changed["h"].max_abs == 2.0


def test_nan_and_infinity(tmp_path: Path) -> None:
    a = torch.tensor([math.nan, math.nan, 1.0, math.inf, 0.0, math.inf])
    b = torch.tensor([math.nan, 1.0, math.nan, math.inf, -0.0, -math.inf])
    b.view(torch.int32)[0] ^= 1
    (change,) = both({"w": a}, {"w": b}, tmp_path).changed
    assert (change.differing, change.nan, change.nan_bits) == (5, 2, 1)
    assert (change.max_abs, change.max_rel, change.at) == (math.inf, math.inf, (5,))
    (change,) = both({"w": a[:1]}, {"w": b[:1]}, tmp_path).changed
    assert (change.differing, change.nan_bits, change.max_abs, change.at) == (1, 1, None, None)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda value: value.clone(),
    "transposed": lambda value: value.t().contiguous().t(),
    "slice": lambda value: torch.cat([value, value], 1)[:, : value.shape[1]],
    "every_second": lambda value: value.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4), (700, 900)])
def test_layout_makes_no_difference(left: str, right: str, shape: tuple[int, int], tmp_path: Path) -> None:
    value = torch.randn(shape)
    other = value.clone()
    other[-1, 1] += 7
    a, b = LAYOUTS[left](value), LAYOUTS[right](other)
    assert both({"w": a}, {"w": LAYOUTS[right](value)}, tmp_path)
    (change,) = both({"w": a}, {"w": b}, tmp_path).changed
    assert (change.at, change.differing) == ((shape[0] - 1, 1), 1)
    assert change.max_abs == abs(value[-1, 1].double() - other[-1, 1].double()).item()


def test_repeated_elements(tmp_path: Path) -> None:
    row = torch.randn(1, 500)
    assert both({"w": row.expand(3000, 500)}, {"w": row.expand(3000, 500).contiguous()}, tmp_path)
    other = row.expand(3000, 500).contiguous()
    other[2999, 499] = 9
    (change,) = both({"w": row.expand(3000, 500)}, {"w": other}, tmp_path).changed
    assert (change.at, change.differing) == ((2999, 499), 1)


def test_large_tensors_are_found_wherever_they_differ(tmp_path: Path) -> None:
    value = torch.zeros(3, 400, 500)
    for index in [(0, 0, 0), (1, 399, 499), (2, 100, 3)]:
        other = value.clone()
        other[index] = 2
        (change,) = both({"w": value}, {"w": other}, tmp_path).changed
        assert (change.at, change.differing, change.max_abs) == (index, 1, 2.0)


def test_what_changed_most_stands_first(tmp_path: Path) -> None:
    a = {key: torch.zeros(2) for key in ["small", "large", "nan", "shape", "dtype", "same", "middle"]}
    b: dict[str, torch.Tensor] = {
        "small": torch.full((2,), 0.1), "large": torch.full((2,), 100.0), "nan": torch.tensor([math.nan, 0]),
        "shape": torch.zeros(3), "dtype": torch.ones(2, dtype=torch.float64), "same": torch.zeros(2),
        "middle": torch.full((2,), 5.0),
    }  # fmt: skip
    report = both(a, b, tmp_path)
    assert [change.key for change in report.changed] == ["shape", "nan", "large", "middle", "dtype", "small"]
    assert report.changed[0].shapes == ((2,), (3,))
    assert (report.changed[0].differing, report.changed[0].max_abs) == (None, None)
    text = repr(report)
    assert "different; 6 of 7 tensors differ, most 'shape'" in text
    assert str(tmp_path / "a.pt") in text


def test_dtypes_that_differ_are_compared_by_value(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 2.5, 1e-3])
    (change,) = both({"w": a}, {"w": a.to(torch.bfloat16)}, tmp_path).changed
    assert change.dtypes == ("float32", "bfloat16")
    assert change.max_abs == (a.double() - a.to(torch.bfloat16).double()).abs().max().item()
    assert change.differing == 1
    (change,) = both({"w": torch.tensor([1, 2])}, {"w": torch.tensor([1.0, 2.0])}, tmp_path).changed
    assert (change.differing, change.max_abs) == (0, None)
    (change,) = both(
        {"w": torch.zeros(2)}, {"w": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)}, tmp_path
    ).changed
    assert (change.differing, change.max_abs) == (None, None)


def test_names_on_one_side(tmp_path: Path) -> None:
    report = both({"a": torch.ones(1), "x": torch.ones(2)}, {"a": torch.ones(1), "y": torch.arange(3)}, tmp_path)
    (left,), (right,) = report.only_in_a, report.only_in_b
    assert (left.key, left.dtype, left.shape, left.excuse) == ("x", "float32", (2,), None)
    assert (right.key, right.dtype, right.shape) == ("y", "int64", (3,))
    assert not report
    assert report.values == ()
    assert both({"a": 1}, {"a": 1}, tmp_path)


def test_only_and_key_maps(tmp_path: Path) -> None:
    state = {"enc.w": torch.ones(1), "dec.w": torch.ones(1)}
    a = save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 1}, tmp_path / "a.pt")
    b = save({"enc.w": torch.ones(1), "dec.w": torch.zeros(1)}, tmp_path / "b.pt")
    opened = reweft.open(a, top_level_key="model", keys=reweft.KeyMap([(r"^module\.", "")]))
    assert [change.key for change in reweft.diff(opened, b).changed] == ["dec.w"]
    assert reweft.diff(opened, b, only="^enc")
    assert reweft.diff(opened, b, only=["^enc", "^nothing"])
    with pytest.raises(reweft.UsageError):
        reweft.diff(opened, b, only="(")


def test_tensors_in_memory(tmp_path: Path) -> None:
    module = nn.Linear(3, 4)
    path = save(module.state_dict(), tmp_path / "a.pt")
    assert reweft.diff(path, checkpoint_of(module.state_dict()))
    with torch.no_grad():
        module.weight[1, 2] += 1
    (change,) = reweft.diff(path, checkpoint_of(module.state_dict())).changed
    assert (change.key, change.at) == ("weight", (1, 2))


def test_ties_are_told_and_are_no_difference(tmp_path: Path) -> None:
    tied = torch.randn(2, 3)
    a, b = {"a": tied, "b": tied, "c": tied[:1]}, {"a": tied.clone(), "b": tied.clone(), "c": tied[:1].clone()}
    report = both(a, b, tmp_path)
    assert report.equal
    assert report.ties == (reweft.TiedTensors(("a", "b"), "a"),)
    assert both(b, a, tmp_path).ties == (reweft.TiedTensors(("a", "b"), "b"),)
    assert both(a, a, tmp_path).ties == ()
    changed = tied.clone()
    changed[0, 0] += 1
    report = both(a, {"a": changed, "b": changed, "c": tied[:1]}, tmp_path)
    assert [change.key for change in report.changed] == ["a", "b"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls these kinds experimental
def test_what_cannot_be_read_is_reported_and_no_equality(tmp_path: Path) -> None:
    state = {"w": torch.ones(1), "m": torch.empty(2, device="meta")}
    report = both(state, state, tmp_path)
    assert [(row.key, row.side) for row in report.unreadable] == [("m", "a"), ("m", "b")]
    assert "meta" in report.unreadable[0].reason
    assert not report
    report = both(state, {"w": torch.ones(1), "m": torch.ones(2)}, tmp_path)
    assert [(row.key, row.side) for row in report.unreadable] == [("m", "a")]
    report = both(state, {"w": torch.ones(1)}, tmp_path)
    assert [(row.key, row.dtype) for row in report.only_in_a] == [("m", None)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says it once a process
def test_quantised_tensors_are_compared_by_their_parts(tmp_path: Path) -> None:
    def quantised(value: float) -> torch.Tensor:
        return torch.quantize_per_tensor(torch.tensor([0.1, value]), 0.1, 3, torch.qint8)

    a, b = quantised(0.2), quantised(0.5)
    assert both({"w": a}, {"w": a}, tmp_path)
    (change,) = both({"w": a}, {"w": b}, tmp_path).changed
    assert (change.key, change.max_abs) == ("w.int_repr", 3)


def values_of(a: object, b: object, folder: Path) -> dict[str, tuple[str | None, str | None]]:
    report = both({"w": torch.ones(1), "v": a}, {"w": torch.ones(1), "v": b}, folder)
    assert (report.changed, report.only_in_a, report.only_in_b) == ((), (), ())
    assert report.equal == (not report.values)
    return {change.path: (change.a, change.b) for change in report.values}


def test_values_are_compared_by_path(tmp_path: Path) -> None:
    a = {"epoch": 3, "args": argparse.Namespace(lr=0.1, names=["a", "b"]), "gone": None, "t": (1, {"x": math.nan})}
    b = {"epoch": 4, "args": argparse.Namespace(lr=0.2, names=["a", "c"]), "new": "x", "t": (1, {"x": math.nan})}
    assert values_of(a, b, tmp_path) == {
        "v.epoch": ("int 3", "int 4"),
        "v.args.lr": ("float 0.1", "float 0.2"),
        "v.args.names.1": ('str "b"', 'str "c"'),
        "v.gone": ("None", None),
        "v.new": (None, 'str "x"'),
    }
    assert values_of(a, a, tmp_path) == {}
    report = both({"w": torch.ones(1), "e": 1}, {"w": torch.ones(1), "e": 2}, tmp_path, values=False)
    assert (report.equal, report.values) == (True, ())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0), (1, True), (0.0, -0.0), ("1", 1), ([1], (1,)), ([1], [1, 2]), ({1: 0}, {"1": 0}), ({1}, {2}),
        (b"a", bytearray(b"a")), ("x" * 10_000, "x" * 9_999 + "y"), (bytes(10_000), bytes(9_999) + b"\1"),
        (10**400, 10**400 + 1), (np.array(["a"]), np.array(["b"])), (np.float32(1), np.float64(1)), (1j, 1 + 1j),
        ({("a,b",): 0}, {("a", "b"): 0}), ({((1,),): 0}, {((2,),): 0}), (torch.float16, torch.float32),
        (slice(1), slice(2)), (collections.deque([1]), collections.deque([2])), (nn.ReLU, nn.GELU),
    ],
)  # fmt: skip
def test_values_that_differ(a: object, b: object, tmp_path: Path) -> None:
    assert values_of(a, b, tmp_path)
    assert values_of(a, a, tmp_path) == {}
    assert values_of([a, {"x": b}], [a, {"x": a}], tmp_path)


def test_tensors_of_an_optimizer_are_no_values(tmp_path: Path) -> None:
    def state(steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(steps):
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}

    assert both(state(1), state(1), tmp_path)
    report = both(state(1), state(2), tmp_path)
    assert report.values == ()
    assert "optimizer.state.0.step" in {change.key for change in report.changed}
    report = both(state(0), state(1), tmp_path)
    assert {row.key.split(".")[0] for row in report.only_in_b} == {"optimizer"}


def test_values_are_not_compared_where_a_format_has_none(tmp_path: Path) -> None:
    a = save({"w": torch.ones(1), "epoch": 3}, tmp_path / "a.pt")
    save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors", metadata={"k": "v"})
    assert reweft.diff(a, tmp_path / "b.safetensors").equal
    save_file({"w": torch.ones(1)}, tmp_path / "c.safetensors", metadata={"k": "x", "l": "y"})
    report = reweft.diff(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert {(change.path, change.a, change.b) for change in report.values} == {
        ("__metadata__.k", '"v"', '"x"'),
        ("__metadata__.l", None, '"y"'),
    }


def test_values_that_hold_themselves(tmp_path: Path) -> None:
    def looped(number: int) -> list[Any]:
        value: list[Any] = [number]
        value.append({"again": value})
        return value

    assert values_of(looped(1), looped(1), tmp_path) == {}
    assert values_of(looped(1), looped(2), tmp_path) == {"v.0": ("int 1", "int 2")}


def test_values_that_are_shared(tmp_path: Path) -> None:
    def laughs(last: str, levels: int) -> list[Any]:
        value: list[Any] = [last]
        for _ in range(levels):
            value = [value] * 10
        return value

    assert values_of(laughs("a", 3), laughs("a", 3), tmp_path) == {}
    ((left, right),) = values_of(laughs("a", 3), laughs("b", 3), tmp_path).values()
    assert (left, right) == ('str "a"', 'str "b"')
    with pytest.raises(reweft.LimitError):
        values_of(laughs("a", 100), laughs("a", 100), tmp_path)


def test_objects_that_are_not_known(tmp_path: Path) -> None:
    a, b = tmp_path / "a.pkl", tmp_path / "b.pkl"
    call = b"\x80\x02}X\x01\0\0\0kcm\nNet\n)\x81}X\x01\0\0\0aK"
    a.write_bytes(call + b"\x01sbs.")
    b.write_bytes(call + b"\x02sbs.")
    assert [(change.path, change.a) for change in reweft.diff(a, b).values] == [("k.a", "int 1")]
    assert reweft.diff(a, a)
    # A state that is no dict is not understood, and said to be.
    a.write_bytes(b"\x80\x02}X\x01\0\0\0kcm\nNet\n)\x81K\x01bs.")
    b.write_bytes(b"\x80\x02}X\x01\0\0\0kcm\nNet\n)\x81K\x02bs.")
    assert reweft.diff(a, b).values_not_compared == ("k",)


elements = st.lists(st.floats(width=32), min_size=1, max_size=40)


@given(a=elements, b=elements)
@settings(max_examples=100, deadline=None)
def test_any_floats(a: list[float], b: list[float]) -> None:
    left, right = (torch.tensor((side * 40)[:40]) for side in (a, b))
    report = reweft.diff(checkpoint_of({"w": left}), checkpoint_of({"w": right}))
    differing = int((left.view(torch.int32) != right.view(torch.int32)).sum())
    assert report.equal == (differing == 0)
    if differing:
        (change,) = report.changed
        numbers = (left.double() - right.double()).abs().masked_fill(left == right, 0)
        counted = (left.view(torch.int32) != right.view(torch.int32)) & ~(left.isnan() | right.isnan())
        assert change.differing == differing
        assert change.max_abs == (numbers[counted].max().item() if counted.any() else None)
        assert change.nan == int((left.isnan() ^ right.isnan()).sum())


def test_shards_and_programs(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}
    for number, key in enumerate(state):
        save_file({key: state[key]}, tmp_path / f"{number}.safetensors")
    index = {"metadata": {}, "weight_map": {key: f"{number}.safetensors" for number, key in enumerate(state)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = save(state, tmp_path / "whole.pt")
    assert reweft.diff(tmp_path / "model.safetensors.index.json", whole)
    state["a.bias"][1] += 1
    (change,) = reweft.diff(tmp_path / "model.safetensors.index.json", save(state, tmp_path / "other.pt")).changed
    assert (change.key, change.at) == ("a.bias", (1,))
    with pytest.raises(reweft.ReweftError):
        reweft.diff(tmp_path, whole)
    module = nn.Sequential(collections.OrderedDict(a=nn.Linear(4, 3)))
    program = torch.export.export(module, (torch.ones(1, 4),))
    torch.export.save(program, tmp_path / "p.pt2")
    report = reweft.diff(tmp_path / "p.pt2", save(module.state_dict(), tmp_path / "m.pt"))
    assert (report.equal, report.tensors) == (True, 2)


def test_damage_is_an_error(tmp_path: Path) -> None:
    a = save({"w": torch.full((1000,), 1.5)}, tmp_path / "a.pt")
    data = bytearray(a.read_bytes())
    at = data.index(torch.full((8,), 1.5).numpy().tobytes()) + 80
    data[at] ^= 1
    (tmp_path / "b.pt").write_bytes(data)
    with pytest.raises(reweft.FormatError, match="CRC") as error:
        reweft.diff(a, tmp_path / "b.pt")
    assert_says(error, tmp_path / "b.pt", '"w"')
    with pytest.raises(reweft.IoError):
        reweft.diff(a, tmp_path / "absent.pt")
    assert without_crc({"w": torch.full((1000,), 1.5)}, tmp_path / "c.pt")
    assert reweft.diff(a, tmp_path / "c.pt")


class TestPackages:
    def test_a_package_has_the_weights_it_was_made_from(self, digits: Package, tmp_path: Path) -> None:
        report = reweft.diff(digits.path, save(digits.module(0).state_dict(), tmp_path / "a.pt"))
        assert report, report
        assert report.tensors > 0
        report = reweft.diff(digits.path, save(digits.module(1).state_dict(), tmp_path / "a.pt"))
        assert report.changed
        assert report.changed[0].max_abs

    def test_two_packages(self, digits: Package, digits_b: Path, tmp_path: Path) -> None:
        assert reweft.diff(digits.path, digits.path)
        reweft.refit(digits.path, digits_b, out=tmp_path / "b.pt2")
        report = reweft.diff(digits.path, tmp_path / "b.pt2")
        changed = {change.key: change for change in report.changed}
        a, b = digits.module(0).state_dict(), digits.module(1).state_dict()
        for key, change in changed.items():
            assert change.max_abs == (a[key].double() - b[key].double()).abs().max().item()
        assert reweft.diff(tmp_path / "b.pt2", digits_b)

    def test_tied_names_are_all_there(self, tied: Package, tmp_path: Path) -> None:
        state = tied.module(0).state_dict()
        report = reweft.diff(tied.path, save(state, tmp_path / "a.pt"))
        assert report.equal
        assert report.tensors == len(state)
        report = reweft.diff(tied.path, save({key: value.clone() for key, value in state.items()}, tmp_path / "b.pt"))
        assert report.equal
        assert [tie.tied_in for tie in report.ties] == ["a"]

    def test_layouts_and_buffers_of_the_program(self, mixed: Package, tmp_path: Path) -> None:
        report = reweft.diff(mixed.path, save(mixed.module(0).state_dict(), tmp_path / "a.pt"))
        assert report.equal, report.changed
        assert {row.excuse for row in report.only_in_a} <= {"no state_dict has it"}
        assert report.only_in_a

    def test_weights_inside_the_library_are_compared(self, stock_embedded: Package, tmp_path: Path) -> None:
        report = reweft.diff(stock_embedded.path, save(stock_embedded.module(0).state_dict(), tmp_path / "a.pt"))
        assert not report, "the bias is in the code"
        assert not report.unreadable
        assert not report.changed


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """Two files of 256 MiB, in a process that may not have 200 MiB of data."""
    state: Mapping[str, torch.Tensor] = {f"w{number}": torch.full((16, 1 << 20), float(number)) for number in range(4)}
    a = save(state, tmp_path / "a.pt")
    state["w3"][15, -1] = 9
    b = save(state, tmp_path / "b.pt")
    code = (
        "import resource, sys, reweft;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "report = reweft.diff(*sys.argv[1:]);"
        "print(report.changed[0].key, report.changed[0].at);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, a, b], capture_output=True, text=True, check=True)
    changed, grown = done.stdout.splitlines()
    assert changed == "w3 (15, 1048575)"
    assert int(grown) < 32 << 10
