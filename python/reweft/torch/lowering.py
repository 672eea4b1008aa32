"""From torch's operations to the steps of a recipe: one table.

Only what IEEE 754 defines to the last bit, and what moves elements without changing them, has steps of the engine's. In
everything else it would give other bytes than torch does, so such an operation becomes a step that torch carries out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from reweft.torch.replay import arguments_of, is_pure
from reweft.torch.tensors import dtype_name, raw

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_STEPS", "Lost", "Node", "key_of", "lower"]

MAX_STEPS = 1000
"""Steps of one recipe, as the engine limits them."""

# Ranges of rows that are worth a step each.
_RANGES = 64

Steps: TypeAlias = list[dict[str, Any]]


class Lost(Exception):  # noqa: N818  (it is an answer)
    """There is no recipe for it."""


class _Foreign(Exception):  # noqa: N818  (it is an answer)
    """The engine has no steps for one operation."""


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on tensors, each of which is such an operation, a weight or a literal."""

    op: str
    """As `key_of` names it; or "leaf" of a name, "literal" of a tensor, "getitem" of a node and a number."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    """What it gave: a tensor, or several."""

    @property
    def shape(self) -> list[int]:
        """Elements along each dimension."""
        return list(self.out.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        dtype: torch.dtype = self.out.dtype
        return dtype


def key_of(func: object) -> str:
    """The name of an operator with its overload; empty for what is none."""
    if isinstance(func, torch._ops.OpOverload):  # noqa: SLF001  (the classes of `torch.ops` have no other name)
        return f"{func._schema.name}.{func._overloadname}"  # noqa: SLF001
    if isinstance(func, torch._ops.OpOverloadPacket):  # noqa: SLF001
        return f"{func._qualified_op_name}.default"  # noqa: SLF001
    return ""


def lower(node: Node) -> Steps:
    """The steps that make a tensor.

    Raises:
        Lost: There are none.
    """
    rule = _RULES.get(node.op)
    try:
        steps = _torch(node) if rule is None else rule(node, *node.args, **node.kwargs)
    except _Foreign:
        steps = _torch(node)
    if len(steps) > MAX_STEPS:
        raise Lost(f"it takes more than {MAX_STEPS} steps")
    return steps


def _torch(node: Node) -> Steps:
    """The step that torch carries out.

    Raises:
        Lost: It would do more than compute, or cannot be written down.
    """
    number, of = (node.args[1], node.args[0]) if node.op == "getitem" else (0, node)
    name = of.op.removesuffix(".default")
    if not is_pure(of.op):
        raise Lost(f"it is made with {name}, which is no operator of torch's that only computes")
    try:
        text, nodes = arguments_of(of.args, of.kwargs, lambda value: isinstance(value, Node))
    except TypeError as error:
        raise Lost(f"it is made with {name}, and {error}") from error
    if node.out.layout is not torch.strided:
        raise Lost(f"{name} gives a tensor that is not strided")
    steps = [step for operand in nodes for step in lower(operand)]
    made = {"dtype": dtype_name(node.dtype), "shape": node.shape, "result": number}
    return [*steps, {"op": "torch", "operator": of.op, "arguments": text, "count": len(nodes), **made}]


def _leaf(_node: Node, name: str) -> Steps:
    return [{"op": "leaf", "key": name}]


def _literal(_node: Node, value: torch.Tensor) -> Steps:
    """A constant.

    Raises:
        Lost: Its bytes are not its values.
    """
    if value.is_conj() or value.is_neg():
        raise Lost("a lazily conjugated constant is part of it")
    return [_constant(value)]


def _constant(value: torch.Tensor) -> dict[str, Any]:
    return {"op": "literal", "dtype": dtype_name(value.dtype), "shape": list(value.shape), "bytes": raw(value).hex()}


def _cast(steps: Steps, before: torch.dtype, after: torch.dtype) -> Steps:
    """The elements in another dtype.

    Raises:
        _Foreign: One of the two is no float.
    """
    if before == after:
        return steps
    if not (before.is_floating_point and after.is_floating_point):
        raise _Foreign(f"the engine has no cast from {dtype_name(before)} to {dtype_name(after)}")
    return [*steps, {"op": "cast", "from": dtype_name(before), "to": dtype_name(after)}]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What torch computes in.

    Raises:
        _Foreign: It is no float.
    """
    if dtype in {torch.float32, torch.bfloat16, torch.float16}:
        return torch.float32
    if dtype == torch.float64:
        return dtype
    raise _Foreign(f"the engine does not compute in {dtype_name(dtype)}")


def _operand(value: Node | float, dtype: torch.dtype) -> Steps:
    """A tensor or a number, in the dtype that is computed in.

    Raises:
        _Foreign: It is something else.
    """
    if isinstance(value, Node):
        return _cast(lower(value), value.dtype, dtype)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Foreign(f"an operand is a {type(value).__name__}")
    return [_constant(torch.tensor(value, dtype=dtype))]


def _function(name: str, *operands: Node | float, of: Node) -> Steps:
    """A function in the dtype that torch computes in, rounded to that of the result."""
    wide = _wide(of.dtype)
    steps = [step for operand in operands for step in _operand(operand, wide)]
    return _cast([*steps, {"op": "arithmetic", "function": name}], wide, of.dtype)


def _binary(name: str) -> Rule:
    def rule(node: Node, left: Node | float, right: Node | float, *, alpha: float = 1) -> Steps:
        if alpha != 1:
            raise _Foreign(f"{node.op} scales its second operand, which rounds otherwise")
        if _wide(node.dtype) != node.dtype and not _rounds_once(name, node, left, right):
            raise _Foreign(f"{node.op} narrows an operand before it computes")
        return _function(name, left, right, of=node)

    return rule


def _rounds_once(name: str, node: Node, left: Node | float, right: Node | float) -> bool:
    """Whether torch computes narrow floats in float32 and rounds the result alone.

    It narrows a number, or a tensor without dimensions, that is added or that is the first operand.
    """
    whole = [isinstance(of, Node) and of.dtype == node.dtype for of in (left, right)]
    return all(whole) or (whole[0] and name in {"mul", "div"} and not (isinstance(right, Node) and right.shape))


def _sqrt(node: Node, of: Node) -> Steps:
    """A square root.

    Raises:
        _Foreign: It is MKL's, which does not round to nearest on every processor.
    """
    if _wide(node.dtype) == node.dtype:
        raise _Foreign("a square root of wide floats")
    return _function("sqrt", of, of=node)


def _rsqrt(node: Node, of: Node) -> Steps:
    """One over a square root.

    Raises:
        _Foreign: The square root is narrowed where elements fill no vector.
    """
    wide = _wide(node.dtype)
    if wide != node.dtype:
        raise _Foreign("a reciprocal square root of narrow floats")
    steps = [*_operand(1.0, wide), *_operand(of, wide), {"op": "arithmetic", "function": "sqrt"}]
    return _cast([*steps, {"op": "arithmetic", "function": "div"}], wide, node.dtype)


def _reciprocal(node: Node, of: Node) -> Steps:
    return _function("div", 1.0, of, of=node)


def _negative(node: Node, of: Node) -> Steps:
    return _function("mul", of, -1.0, of=node)


def _power(node: Node, of: Node, exponent: float) -> Steps:
    if exponent != 2:  # noqa: PLR2004  (the one that torch squares for)
        raise _Foreign(f"the engine has no power of {exponent}")
    return _function("mul", of, of, of=node)


def _same(node: Node, of: Node, *_layout: Any, **_more: Any) -> Steps:
    """Another layout of the same elements; which one a row has is in the package."""
    return _cast(lower(of), of.dtype, node.dtype)


def _packed(node: Node, of: Node, *_shapes: Any, **_more: Any) -> Steps:
    """The elements in an order of oneDNN's; which one is in the package. Packing may narrow them."""
    return _cast(lower(of), of.dtype, node.dtype)


def _packed_transposed(
    node: Node, of: Node, _padding: Any, _more_padding: Any, _stride: Any, _dilation: Any, groups: int = 1, *_rest: Any
) -> Steps:
    """As `_packed`, for a transposed convolution, of which oneDNN takes the output's channels first."""
    steps = _cast(lower(of), of.dtype, node.dtype)
    if groups == 1:
        return _permuted(steps, [1, 0, *range(2, len(of.shape))])
    before, after, *kernel = of.shape
    steps = _shaped(steps, of.shape, [groups, before // groups, after, *kernel])
    return _permuted(steps, [0, 2, 1, *range(3, len(of.shape) + 1)])


def _permute(_node: Node, of: Node, dims: list[int]) -> Steps:
    return _permuted(lower(of), [dim % len(dims) for dim in dims])


def _permuted(steps: Steps, order: list[int]) -> Steps:
    if steps[-1]["op"] == "permute":
        order = [steps[-1]["dims"][dim] for dim in order]
        steps = steps[:-1]
    return steps if order == sorted(order) else [*steps, {"op": "permute", "dims": order}]


def _transpose(node: Node, of: Node, first: int = 0, second: int = 1) -> Steps:
    dims = list(range(len(node.shape)))
    if dims:
        dims[first], dims[second] = dims[second], dims[first]
    return _permute(node, of, dims)


def _reshape(node: Node, of: Node, *_sizes: Any) -> Steps:
    """The same elements in row-major order, whatever the layout."""
    return _shaped(lower(of), of.shape, node.shape)


def _shaped(steps: Steps, before: list[int], after: list[int]) -> Steps:
    if steps[-1]["op"] == "reshape":
        steps = steps[:-1]
    elif before == after:
        return steps
    return [*steps, {"op": "reshape", "shape": after}]


def _expand(node: Node, of: Node, *_sizes: Any, **_more: Any) -> Steps:
    return lower(of) if of.shape == node.shape else [*lower(of), {"op": "expand", "shape": node.shape}]


def _narrow(of: Node, dim: int, start: int, length: int) -> Steps:
    return [*lower(of), {"op": "slice", "dim": dim % len(of.shape), "start": start, "length": length}]


def _slice(
    node: Node,
    of: Node,
    dim: int = 0,
    *ends: int | None,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Steps:
    """A range along a dimension.

    Raises:
        _Foreign: It leaves some out.
    """
    first, _last, every = slice(*[*ends, *(start, end, step)[len(ends) :]]).indices(of.shape[dim])
    if every != 1:
        raise _Foreign("the engine has no slices with steps")
    length = node.shape[dim]
    return lower(of) if length == of.shape[dim] else _narrow(of, dim, first, length)


def _select(node: Node, of: Node, dim: int, index: int) -> Steps:
    return [*_narrow(of, dim, index % of.shape[dim], 1), {"op": "reshape", "shape": node.shape}]


def _concat(node: Node, parts: list[Node], dim: int = 0) -> Steps:
    # Torch leaves empty tensors of one dimension out.
    parts = [part for part in parts if part.shape != [0]]
    steps = [step for part in parts for step in _cast(lower(part), part.dtype, node.dtype)]
    return [*steps, {"op": "concat", "dim": dim % len(node.shape), "count": len(parts)}]


def _embedding(node: Node, of: Node, indices: Node, *_more: Any, **_rest: Any) -> Steps:
    """Rows by number, if the numbers are no weights: the ranges that they come in.

    Raises:
        _Foreign: They are, or come in too many.
    """
    if any(step["op"] == "leaf" for step in lower(indices)):
        raise _Foreign("rows are taken by numbers that are weights")
    ranges: list[list[int]] = []
    for index in indices.out.reshape(-1).tolist():
        if ranges and sum(ranges[-1]) == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, 1])
    if not 0 < len(ranges) <= _RANGES:
        raise _Foreign(f"rows are taken in {len(ranges)} ranges")
    steps = [step for start, length in ranges for step in _narrow(of, 0, start, length)]
    if len(ranges) > 1:
        steps.append({"op": "concat", "dim": 0, "count": len(ranges)})
    return _shaped(steps, [], node.shape)


def _item(node: Node, of: Node, number: int) -> Steps:
    """One of several results.

    Raises:
        _Foreign: The operator has no steps.
    """
    rule = _PARTS.get(of.op)
    if rule is None:
        raise _Foreign(f"the engine has no {of.op.removesuffix('.default')}")
    return rule(node, number, of, *of.args, **of.kwargs)


def _split(node: Node, number: int, several: Node, of: Node, _sizes: Any, dim: int = 0) -> Steps:
    start = sum(part.shape[dim] for part in several.out[:number])
    return _narrow(of, dim, start, node.shape[dim])


def _unbind(node: Node, number: int, _several: Node, of: Node, dim: int = 0) -> Steps:
    return [*_narrow(of, dim, number, 1), {"op": "reshape", "shape": node.shape}]


def _packed_part(node: Node, number: int, _several: Node, *of: Any, **_more: Any) -> Steps:
    """One of the two weights of a recurrent layer, which are packed together.

    Raises:
        _Foreign: It is not made of one tensor.
    """
    if not isinstance(of[number], Node) or len(of[number].shape) != 2:  # noqa: PLR2004
        raise _Foreign("a packed result has no tensor of its own")
    # oneDNN takes the weights of a recurrent layer by their input first.
    return _cast(_permuted(lower(of[number]), [1, 0]), of[number].dtype, node.dtype)


Rule: TypeAlias = "Callable[..., Steps]"

_RULES: dict[str, Rule] = {
    "leaf": _leaf,
    "literal": _literal,
    "getitem": _item,
    **{f"aten::{name}.{kind}": _binary(name) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    "aten::sqrt.default": _sqrt,
    "aten::rsqrt.default": _rsqrt,
    "aten::reciprocal.default": _reciprocal,
    "aten::neg.default": _negative,
    "aten::pow.Tensor_Scalar": _power,
    **{
        f"aten::{name}.default": _same
        for name in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "_to_copy")
    },
    "aten::to.dtype": _same,
    "prims::convert_element_type.default": _same,
    "aten::permute.default": _permute,
    "aten::transpose.int": _transpose,
    "aten::t.default": _transpose,
    **{f"aten::{name}.default": _reshape for name in ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze")},
    "aten::squeeze.dim": _reshape,
    "aten::squeeze.dims": _reshape,
    "aten::flatten.using_ints": _reshape,
    "aten::expand.default": _expand,
    "aten::slice.Tensor": _slice,
    "aten::select.int": _select,
    "aten::cat.default": _concat,
    "aten::embedding.default": _embedding,
    "mkldnn::_reorder_convolution_weight.default": _packed,
    "mkldnn::_reorder_convolution_transpose_weight.default": _packed_transposed,
    "mkldnn::_reorder_linear_weight.default": _packed,
}
"""By operator: what it takes, and its steps."""

_PARTS: dict[str, Rule] = {
    "aten::split.Tensor": _split,
    "aten::split_with_sizes.default": _split,
    "aten::chunk.default": _split,
    "aten::unbind.int": _unbind,
    "mkldnn::_reorder_mkldnn_rnn_layer_weight.default": _packed_part,
}
"""By operator with several results: one of them."""
