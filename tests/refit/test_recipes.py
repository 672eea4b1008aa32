"""Random recipes of folded weights are followed to the last bit, and edited ones are refused."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_random import (
    DTYPES,
    MODEL,
    Row,
    Values,
    blob,
    check_package,
    check_tensors,
    deterministic,
    made,
    orders,
    package,
    shapes,
    weights,
)

import reweft
from reweft import _core
from reweft.torch import replay
from reweft.torch.folding import Recorder
from support import NO_CALL, raw, save, with_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

Step = dict[str, Any]

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# What the engine computes in.
WIDE = FLOATS[:2]
# Elements cannot be moved one by one where two share a byte.
MOVABLE = [dtype for dtype in DTYPES if dtype != torch.float4_e2m1fn_x2]
# The name of the row that recipes are for.
FROZEN = "_frozen_param0"
MAX_NUMEL = 300
# As the engine limits them: bytes that are made on the way, for each byte of the row and of what it is made of.
MAX_EXPANSION = 64

thorough = settings(deterministic, max_examples=50)
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


class Made(NamedTuple):
    """Steps, and what torch makes by them of each of several sets of weights."""

    steps: list[Step]
    values: list[torch.Tensor]
    nbytes: int
    """Bytes of everything that is made on the way."""

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[0].shape)

    @property
    def numel(self) -> int:
        return self.values[0].numel()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What torch has to carry out: operator, arguments, and the function that people call for it.
TORCH: dict[tuple[str, str], Callable[..., torch.Tensor]] = {
    ("aten::exp.default", '[[{"tensor":0}]]'): torch.exp,
    ("aten::cos.default", '[[{"tensor":0}]]'): torch.cos,
    ("aten::pow.Tensor_Scalar", '[[{"tensor":0},3.5]]'): lambda of: of**3.5,
    ("aten::pow.Tensor_Scalar", '[[{"tensor":0},-1]]'): lambda of: of**-1,
    ("aten::pow.Tensor_Tensor", '[[{"tensor":0},{"tensor":1}]]'): torch.pow,
    ("aten::add.Tensor", '[[{"tensor":1},{"tensor":0}],{"alpha":0.3}]'): lambda one, other: other.add(one, alpha=0.3),
    ("aten::sum.default", '[[{"tensor":0}],{"dtype":{"dtype":"float64"}}]'): lambda of: of.sum(dtype=torch.float64),
    ("aten::clamp.default", '[[{"tensor":0},{"float":"-inf"},1.5]]'): lambda of: of.clamp(max=1.5),
    ("aten::frexp.Tensor", '[[{"tensor":0}]]'): lambda of: torch.frexp(of)[0],
}


def literal_of(step: Step) -> torch.Tensor:
    data, dtype = bytearray.fromhex(step["bytes"]), getattr(torch, step["dtype"])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(step["shape"])


def square_root(of: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest by the processor. Torch's own is MKL's, which on some processors is not."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(of.numpy())))


ARITHMETIC: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "sqrt": square_root,
}

# What torch does for each step; operands of torch's own operations stand in row-major order.
STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "literal": literal_of,
    "cast": lambda step, of: of.to(getattr(torch, step["to"])),
    "permute": lambda step, of: of.permute(step["dims"]),
    "transpose": lambda step, of: of.transpose(*step["dims"]),
    "reshape": lambda step, of: of.reshape(step["shape"]),
    "slice": lambda step, of: of.narrow(step["dim"], step["start"], step["length"]),
    "chunk": lambda step, of: of.chunk(step["of"], step["dim"])[step["index"]],
    "concat": lambda step, *of: torch.cat(of, step["dim"]),
    "expand": lambda step, of: of.expand(step["shape"]),
    "arithmetic": lambda step, *of: ARITHMETIC[step["function"]](*of),
    "torch": lambda step, *of: TORCH[step["operator"], step["arguments"]](*(value.contiguous() for value in of)),
}


def count_of(step: Step) -> int:
    """How many tensors a step takes."""
    if step["op"] == "arithmetic":
        return 1 if step["function"] == "sqrt" else 2
    count: int = step.get("count", 0 if step["op"] == "literal" else 1)
    return count


def followed(steps: list[Step], named: dict[str, torch.Tensor]) -> torch.Tensor:
    """What torch makes by steps, whatever these are."""
    stack: list[torch.Tensor] = []
    for step in steps:
        if step["op"] == "leaf":
            stack.append(named[step["key"]])
            continue
        operands = [stack.pop() for _ in range(count_of(step))]
        stack.append(STEPS[step["op"]](step, *reversed(operands)))
    (value,) = stack
    return value


def applied(step: Step, *operands: Made) -> Made:
    """One more step."""
    values = [STEPS[step["op"]](step, *of) for of in zip(*(operand.values for operand in operands), strict=True)]
    steps = [one for operand in operands for one in operand.steps]
    return Made([*steps, step], values, sum(operand.nbytes for operand in operands) + values[0].nbytes)


def is_number(of: Made) -> bool:
    """Whether bytes can be compared: which bits a NaN has is the processor's choice."""
    return not any(value.isnan().any() for value in of.values)


def cast(of: Made, dtype: torch.dtype) -> Made:
    return of if of.dtype == dtype else applied({"op": "cast", "from": name_of(of.dtype), "to": name_of(dtype)}, of)


def reshaped(of: Made, shape: list[int]) -> Made:
    return applied({"op": "reshape", "shape": shape}, of)


@st.composite
def literals(draw: st.DrawFn, like: Made, dtype: torch.dtype, shape: tuple[int, ...]) -> Made:
    """Elements that are part of a recipe, some of them special."""
    special = st.sampled_from([1.0, 1 / 3, 0.1, -2.5, 0.0, -0.0, 1e-40, 3e38, math.inf, 65504.0])
    count = math.prod(shape)
    value = torch.tensor(draw(st.lists(special, min_size=count, max_size=count)), dtype=dtype).reshape(shape)
    step = {"op": "literal", "dtype": name_of(dtype), "shape": list(shape), "bytes": raw(value).hex()}
    return Made([step], [value] * len(like.values), value.nbytes)


def dims_of(of: Made) -> st.SearchStrategy[int]:
    """A dimension, counted from either end."""
    return st.integers(-len(of.shape), len(of.shape) - 1)


@st.composite
def sizes(draw: st.DrawFn, of: Made, *, traced: bool) -> list[int]:
    """Another shape of as many elements; one size may be left open."""
    if of.numel == 0:
        return list(draw(st.permutations([1, *of.shape])))
    found, left = [], of.numel
    for _ in range(draw(st.integers(0, 3))):
        found.append(draw(st.sampled_from([size for size in range(1, left + 1) if left % size == 0])))
        left //= found[-1]
    place = draw(st.integers(0, len(found)))
    if left > 1 or draw(st.booleans()):
        found.insert(place, left if traced else draw(st.sampled_from([left, -1])))
    return found


@st.composite
def moves(draw: st.DrawFn, of: Made, *, traced: bool = False) -> Step:
    """A step that leaves no element out and repeats none; perhaps only of the forms that `trace` writes."""
    ops = ["permute", "reshape"] if traced or not of.shape else ["permute", "reshape", "transpose"]
    op = draw(st.sampled_from(ops))
    if op == "reshape":
        return {"op": op, "shape": draw(sizes(of, traced=traced))}
    if op == "transpose":
        return {"op": op, "dims": [draw(dims_of(of)), draw(dims_of(of))]}
    rank = len(of.shape)
    order = draw(st.permutations(range(rank)))
    return {"op": op, "dims": [dim - rank if draw(st.booleans()) else dim for dim in order]}


@st.composite
def ranges(draw: st.DrawFn, of: Made) -> Step:
    """A step that leaves elements out."""
    dim = draw(dims_of(of))
    size = of.shape[dim]
    parts = [count for count in range(1, size + 1) if size % count == 0]
    if draw(st.booleans()) and parts:
        count = draw(st.sampled_from(parts))
        return {"op": "chunk", "dim": dim, "index": draw(st.integers(0, count - 1)), "of": count}
    start = draw(st.integers(0, max(size - 1, 0)))
    length = draw(st.one_of(st.just(size - start), st.integers(min(1, size - start), size - start)))
    return {"op": "slice", "dim": dim, "start": start, "length": length}


@st.composite
def repeats(draw: st.DrawFn, of: Made) -> Step:
    kept = [draw(st.integers(1, 3)) if size == 1 else size for size in of.shape]
    return {"op": "expand", "shape": [*draw(st.lists(st.integers(1, 3), max_size=2)), *kept]}


@st.composite
def changed(draw: st.DrawFn, of: Made) -> Made:
    """One step further, over one tensor."""
    kinds: list[st.SearchStrategy[Step]] = [moves(of), repeats(of)]
    kinds.append(st.sampled_from(FLOATS).map(lambda dtype: {"op": "cast", "to": name_of(dtype)}))
    if of.shape:
        kinds.append(ranges(of))
    if of.dtype in WIDE:
        kinds.append(st.just({"op": "arithmetic", "function": "sqrt"}))
    found = applied(draw(st.one_of(kinds)), of)
    return found if found.numel <= MAX_NUMEL and is_number(found) else of


@st.composite
def fitted(draw: st.DrawFn, of: Made, shape: tuple[int, ...]) -> Made:
    """A tensor of a shape: this one repeated, its first element if it does not fit, another number if it has none."""
    try:
        of.values[0].expand(shape)
    except RuntimeError:
        if of.numel == 0:
            return draw(literals(of, of.dtype, shape))
        of = applied({"op": "slice", "dim": 0, "start": 0, "length": 1}, reshaped(of, [-1]))
        of = reshaped(of, [])
    return applied({"op": "expand", "shape": list(shape)}, of)


def fits(left: Made, right: Made) -> bool:
    try:
        return math.prod(np.broadcast_shapes(left.shape, right.shape)) <= MAX_NUMEL
    except ValueError:
        return False


@st.composite
def computed(draw: st.DrawFn, left: Made, right: Made) -> Made:
    """A function of two tensors, of which each may be repeated."""
    wide = draw(st.sampled_from(WIDE))
    left, right = cast(left, wide), cast(right, wide)
    if not fits(left, right):
        shape = [size if draw(st.booleans()) else 1 for size in left.shape]
        right = draw(fitted(right, tuple(shape[draw(st.integers(0, len(shape))) :])))
    operands = draw(st.permutations([left, right]))
    found = applied({"op": "arithmetic", "function": draw(st.sampled_from(["add", "sub", "mul", "div"]))}, *operands)
    return found if is_number(found) else left


@st.composite
def joined(draw: st.DrawFn, left: Made, right: Made) -> Made:
    """Tensors one behind the other, the first perhaps a second time."""
    left = left if left.shape else reshaped(left, [1])
    dim = draw(dims_of(left))
    shape = list(left.shape)
    shape[dim] = draw(st.integers(1, 3))
    parts = [left, draw(fitted(cast(right, left.dtype), tuple(shape)))]
    parts = draw(st.permutations(parts + [left] * draw(st.integers(0, 1))))
    found = applied({"op": "concat", "dim": dim, "count": len(parts)}, *parts)
    return found if found.numel <= MAX_NUMEL and is_number(found) else left


@st.composite
def recipes(draw: st.DrawFn, leaves: list[Made], depth: int = 2) -> Made:
    """What begins with a leaf, and takes others and literals in."""
    of = draw(st.sampled_from(leaves))
    for _ in range(draw(st.integers(0, 3))):
        of = draw(changed(of))
    for _ in range(draw(st.integers(0, 2)) if depth else 0):
        shape = draw(st.sampled_from([(), (1,), of.shape[-1:]]))
        literal = literals(of, draw(st.sampled_from(FLOATS)), shape)
        other = draw(st.one_of(recipes(leaves, depth - 1), literal))
        of = draw(st.one_of(computed(of, other), joined(of, other)))
        of = draw(changed(of))
    return of


class Folded(NamedTuple):
    """Tensors of a module, of which some stay rows beside the one that is made of all."""

    originals: list[Row]
    kept: list[Row]
    row: Row
    steps: list[Step]

    @property
    def rows(self) -> list[Row]:
        return [self.row, *self.kept]

    def origins(self) -> str:
        """What the engine is told of the package."""
        state = {"persistent": True, "mutated": False, "used": True}
        stated = [
            {"names": row.names, "persistent": True, "dtype": name_of(row.dtype), "shape": row.shape}
            for row in self.originals
            if row not in self.kept
        ]
        folded = {"capability": replay.capability(), "compared": True, "originals": stated}
        return json.dumps(
            {
                "torch": str(torch.__version__),
                "device": "cpu",
                **NO_CALL,
                "tensors": [{"names": row.names, **state} for row in self.originals],
                "folded": {**folded, "recipes": {FROZEN: self.steps}},
            }
        )

    def write(self, values: Values, path: Path) -> Path:
        """A package in which the rows have these bytes."""
        bare = path.with_name("bare.pt2")
        bare.write_bytes(package(self.rows, values, {f"{MODEL}/abc.wrapper_weights.blob": blob(self.rows, values)}))
        _core.seal(bare, self.origins(), path)
        return path


def bits_of(value: torch.Tensor) -> torch.Tensor:
    """The elements as bytes, in one more dimension."""
    return value.clone(memory_format=torch.contiguous_format).unsqueeze(-1).view(torch.uint8)


def positive(rows: list[Row], seed: int) -> list[torch.Tensor]:
    """Numbers of several magnitudes, so that sums round, and few results are NaN."""
    generator = torch.Generator().manual_seed(seed)
    exponents = [torch.rand(row.shape, generator=generator, dtype=torch.float64) * 10 - 5 for row in rows]
    return [value.exp().to(row.dtype) for row, value in zip(rows, exponents, strict=True)]


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype]) -> Row:
    shape = draw(shapes.filter(lambda shape: math.prod(shape) <= MAX_NUMEL))
    return Row((), draw(st.sampled_from(dtypes)), shape, draw(orders(len(shape))))


@st.composite
def modules(draw: st.DrawFn, dtypes: list[torch.dtype], count: int) -> list[Row]:
    """Up to so many tensors, some of them under two names."""
    found = draw(st.lists(tensors(dtypes), min_size=1, max_size=count))
    names = [(f"w{i}", f"tied.{i}")[: draw(st.integers(1, 2))] for i in range(len(found))]
    return [row._replace(names=names) for row, names in zip(found, names, strict=True)]


class Case(NamedTuple):
    """A folded row, and what its tensors are in two sets of weights."""

    folded: Folded
    weights: list[list[torch.Tensor]]
    """Of each set, the originals."""
    values: list[Values]
    """Of each set, the rows."""


@st.composite
def cases(draw: st.DrawFn, last: Callable[[Made], st.SearchStrategy[Made]] = st.just) -> Case:
    """Any recipe over some tensors; `last` draws what stands at its end."""
    originals = draw(modules(FLOATS, 3))
    sets = [positive(originals, seed) for seed in (0, 1)]
    leaves = [
        Made([{"op": "leaf", "key": row.names[0]}], list(values), 0)
        for row, *values in zip(originals, *sets, strict=True)
    ]
    of = draw(last(draw(recipes(leaves))))
    read = [row.dtype.itemsize * math.prod(row.shape) for row in originals]
    assume(of.nbytes <= MAX_EXPANSION * (min(read) + of.values[0].nbytes))
    kept = [row for row in originals if draw(st.integers(0, 3)) == 0]
    row = Row((FROZEN,), of.dtype, of.shape, draw(orders(len(of.shape))))
    values = [
        [bits_of(value), *(bits_of(value) for row, value in zip(originals, held, strict=True) if row in kept)]
        for value, held in zip(of.values, sets, strict=True)
    ]
    return Case(Folded(originals, kept, row, of.steps), sets, values)


def saved(data: st.DataObject, case: Case, folder: Path) -> tuple[Path, Path]:
    """Both sets of weights as files, each in a form and with layouts of its own."""
    a, b = (
        data.draw(weights(case.folded.originals)).write(list(map(bits_of, held)), folder / f"weights{number}")
        for number, held in enumerate(case.weights)
    )
    return a, b


def check_refits(case: Case, a: Path, b: Path) -> None:
    """There and back, byte for byte."""
    folder = a.parent
    artifact = case.folded.write(case.values[0], folder / "a.pt2")
    there, back = folder / "b.pt2", folder / "back.pt2"
    reweft.refit(artifact, b, out=there)
    check_package(there, case.folded.rows, case.values[1])
    assert reweft.verify(there, b).equal
    assert reweft.verify(artifact, a).equal
    same = blob(case.folded.rows, case.values[0]) == blob(case.folded.rows, case.values[1])
    assert reweft.verify(artifact, b).equal == reweft.verify(there, a).equal == same
    reweft.refit(there, a, out=back)
    assert back.read_bytes() == artifact.read_bytes()


@thorough
@given(data=st.data())
def test_a_random_recipe_gives_what_torch_gives(tmp_path: Path, data: st.DataObject) -> None:
    case = data.draw(cases())
    check_refits(case, *saved(data, case, Path(tempfile.mkdtemp(dir=tmp_path))))


@st.composite
def chains(draw: st.DrawFn, original: Row) -> tuple[Folded, torch.Tensor]:
    """Moves of one tensor, and which of its elements comes where."""
    numbers = torch.arange(math.prod(original.shape)).reshape(original.shape)
    of = Made([{"op": "leaf", "key": original.names[0]}], [numbers], 0)
    for _ in range(draw(st.integers(0, 6))):
        of = applied(draw(moves(of, traced=True)), of)
    row = Row((FROZEN,), original.dtype, of.shape, draw(orders(len(of.shape))))
    return Folded([original], [], row, of.steps), of.values[0]


def check_read_back(folded: Folded, places: torch.Tensor, folder: Path) -> None:
    """The one original comes out of the row, whatever its bits are."""
    (original,) = folded.originals
    for seed in (0, 1):
        values = made([original], seed)
        moved = values[0].reshape(-1, original.dtype.itemsize)[places]
        artifact = folded.write([moved], folder / f"{seed}.pt2")
        report = reweft.extract(artifact, folder / "back.pt")
        assert not [notice for notice in report.notices if "read back" in notice]
        check_tensors(torch.load(folder / "back.pt"), [original], values, strided=False)


@thorough
@given(data=st.data())
def test_a_random_chain_of_moves_can_be_read_back(tmp_path: Path, data: st.DataObject) -> None:
    folded, places = data.draw(modules(MOVABLE, 1).flatmap(lambda found: chains(found[0])))
    check_read_back(folded, places, Path(tempfile.mkdtemp(dir=tmp_path)))


@st.composite
def ended_by_torch(draw: st.DrawFn, of: Made) -> Made:
    """Something that torch has to compute of it, moved about."""
    operator, arguments = draw(st.sampled_from(list(TORCH)))
    count = arguments.count("tensor")
    step = {"op": "torch", "operator": operator, "arguments": arguments, "count": count, "result": 0}
    found = applied(step, *[of] * count)
    if not is_number(found):
        step |= {"operator": "aten::exp.default", "arguments": '[[{"tensor":0}]]', "count": 1}
        found = applied(step, of)
    step |= {"dtype": name_of(found.dtype), "shape": list(found.shape)}
    for _ in range(draw(st.integers(0, 2))):
        found = draw(changed(found))
    return found


@thorough
@given(data=st.data())
def test_a_recipe_with_a_step_of_torch(tmp_path: Path, data: st.DataObject) -> None:
    case = data.draw(cases(ended_by_torch))
    assert any(step["op"] == "torch" for step in case.folded.steps)
    check_refits(case, *saved(data, case, Path(tempfile.mkdtemp(dir=tmp_path))))


@st.composite
def edited(draw: st.DrawFn, steps: list[Step]) -> list[Step]:
    """Some steps cut, swapped or taken twice, so that they are others."""
    found = list(steps)
    for _ in range(draw(st.integers(1, 3))):
        if not found:
            break
        place, other = (draw(st.integers(0, len(found) - 1)) for _ in range(2))
        edit = draw(st.sampled_from(["cut", "swap", "twice"]))
        if edit == "cut":
            del found[place]
        elif edit == "swap":
            found[place], found[other] = found[other], found[place]
        else:
            found.insert(place, found[other])
    assume(found != steps)
    return found


@thorough
@given(data=st.data())
def test_a_random_recipe_that_is_cut_or_swapped_is_an_error(tmp_path: Path, data: st.DataObject) -> None:
    case, folder = data.draw(cases()), Path(tempfile.mkdtemp(dir=tmp_path))
    _, b = saved(data, case, folder)
    artifact = case.folded.write(case.values[0], folder / "a.pt2")
    assert reweft.plan(artifact, b).ok
    other = data.draw(edited(case.folded.steps))

    def edit(of: dict[str, Any]) -> None:
        of["slots"][0]["recipe"] = other

    with pytest.raises(reweft.ReweftError):
        reweft.plan(with_manifest(artifact, folder / "edited.pt2", edit), b)


def followed_for(case: Case, steps: list[Step]) -> list[torch.Tensor] | None:
    """What torch makes of each set of weights by other steps than the case's; None if they do not fit together."""
    names = [row.names[0] for row in case.folded.originals]
    try:
        return [followed(steps, dict(zip(names, held, strict=True))) for held in case.weights]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None


@thorough
@given(data=st.data())
def test_a_recipe_that_was_edited_before_it_was_sealed_is_refused_or_followed(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Nothing but the steps themselves says that they are wrong then."""
    case, folder = data.draw(cases()), Path(tempfile.mkdtemp(dir=tmp_path))
    steps = data.draw(edited(case.folded.steps))
    wanted = followed_for(case, steps)
    assume(any(step["op"] == "leaf" for step in steps) and not any(value.isnan().any() for value in wanted or []))
    row, values = case.folded.row, case.values[0]
    if wanted is not None:
        shape = tuple(wanted[0].shape)
        row = Row((FROZEN,), wanted[0].dtype, shape, data.draw(orders(len(shape))))
        values = [bits_of(wanted[0]), *values[1:]]
    folded = case.folded._replace(steps=steps, row=row)
    try:
        artifact = folded.write(values, folder / "a.pt2")
    except reweft.ReweftError:
        return
    assert wanted is not None
    _, b = saved(data, case, folder)
    reweft.refit(artifact, b, out=folder / "b.pt2")
    check_package(folder / "b.pt2", folded.rows, [bits_of(wanted[1]), *case.values[1][1:]])


def of_one(steps: list[Step], *, kept: bool = False) -> Case:
    """Steps over one matrix."""
    original = Row(("w0",), torch.float32, (2, 3), (0, 1))
    sets = [positive([original], seed) for seed in (0, 1)]
    of = [followed(steps, {"w0": held[0]}) for held in sets]
    shape = tuple(of[0].shape)
    rows = [original] if kept else []
    folded = Folded([original], rows, Row((FROZEN,), of[0].dtype, shape, tuple(range(len(shape)))), steps)
    values = [[bits_of(value), *map(bits_of, held[: len(rows)])] for value, held in zip(of, sets, strict=True)]
    return Case(folded, sets, values)


LEAF: Step = {"op": "leaf", "key": "w0"}


@pytest.mark.parametrize("step", [{"op": "transpose", "dims": [0, 1]}, {"op": "reshape", "shape": [3, -1]}])
def test_moves_that_trace_does_not_write_can_be_read_back(step: Step, tmp_path: Path) -> None:
    places = followed([LEAF, step], {"w0": torch.arange(6).reshape(2, 3)})
    check_read_back(of_one([LEAF, step]).folded, places, tmp_path)


def test_a_row_that_is_made_of_another_row_is_no_weight(tmp_path: Path) -> None:
    case = of_one([LEAF, {"op": "permute", "dims": [1, 0]}], kept=True)
    artifact = case.folded.write(case.values[0], tmp_path / "a.pt2")
    reweft.extract(artifact, tmp_path / "back.pt")
    assert torch.load(tmp_path / "back.pt").keys() == {"w0"}
    assert reweft.plan(artifact, tmp_path / "back.pt").ok


@pytest.mark.parametrize("strides", [(3, 1), (1, 2)])
@pytest.mark.parametrize("kept", ["folded alone", "a row too"])
def test_weights_of_another_dtype_are_cast_before_a_recipe(strides: tuple[int, int], kept: str, tmp_path: Path) -> None:
    case = of_one([LEAF, {"op": "reshape", "shape": [6]}], kept=kept == "a row too")
    artifact = case.folded.write(case.values[0], tmp_path / "a.pt2")
    weight = torch.empty_strided((2, 3), strides, dtype=torch.float64).copy_(case.weights[1][0])
    b = save({"w0": weight}, tmp_path / "b.pt")
    assert reweft.plan(artifact, b, allow_cast=True).ok
    reweft.refit(artifact, b, out=tmp_path / "b.pt2", allow_cast=True)
    check_package(tmp_path / "b.pt2", case.folded.rows, case.values[1])


ATEN = torch.ops.aten
# What `trace` has steps of the engine for, of a vector and of one number that is not in it.
RECORDED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sqrt": lambda of, _: ATEN.sqrt.default(of),
    "rsqrt": lambda of, _: ATEN.rsqrt.default(of),
    "reciprocal": lambda of, _: ATEN.reciprocal.default(of),
    "square": lambda of, _: ATEN.pow.Tensor_Scalar(of, 2),
    "with itself": lambda of, _: ATEN.div.Tensor(ATEN.sub.Tensor(ATEN.mul.Tensor(of, of), of), ATEN.add.Tensor(of, of)),
    "times 0.1": lambda of, _: ATEN.mul.Tensor(of, 0.1),
    "over 0.1": lambda of, _: ATEN.div.Tensor(of, 0.1),
    "plus 0.1": lambda of, _: ATEN.add.Tensor(of, 0.1),
    "minus 0.1": lambda of, _: ATEN.sub.Tensor(of, 0.1),
    "times a number": ATEN.mul.Tensor,
    "plus a number": ATEN.add.Tensor,
    "a number times it": lambda of, one: ATEN.mul.Tensor(one, of),
    "a number over it": lambda of, one: ATEN.div.Tensor(one, of),
}


# torch's square root is MKL's, which on some processors is not rounded to nearest; in narrow floats torch narrows the
# square root within `rsqrt` where elements fill no vector, and a number before it is added, or is the first operand.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", list(RECORDED))
def test_what_trace_records_gives_what_torch_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # 479 elements leave some that fill no vector.
    originals = [Row(("of",), dtype, (479,), (0,)), Row(("one",), torch.float32, (), ())]
    sets = [positive(originals, seed) for seed in (0, 1)]
    recorder = Recorder(dict(zip(["of", "one"], sets[0], strict=True)))
    with recorder:
        recorder.rows[FROZEN] = RECORDED[name](*sets[0])
    folded = Folded(originals, [], Row((FROZEN,), dtype, (479,), (0,)), recorder.recipes()[FROZEN])
    case = Case(folded, sets, [[bits_of(RECORDED[name](*held))] for held in sets])
    a, b = (save(dict(zip(["of", "one"], held, strict=True)), tmp_path / f"{i}.pt") for i, held in enumerate(sets))
    check_refits(case, a, b)
