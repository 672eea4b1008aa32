"""What the manifest states of a program's arguments and results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from reweft.errors import UnsupportedError, UsageError
from reweft.torch.tensors import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.export import ExportedProgram

__all__ = ["constant", "describe", "flatten", "size_of", "value_of"]

# Names of sympy's and torch's classes, and of the operations of the manifest.
_OPERATIONS = {
    "Add": "add",
    "Mul": "mul",
    "Pow": "pow",
    "PowByNatural": "pow",
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "Mod": "mod",
    "PythonMod": "mod",
    "Min": "min",
    "Max": "max",
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "And": "and",
    "Or": "or",
    "Not": "not",
}


def flatten(spec: pytree.TreeSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments' leaves, in the order of a call specification, whatever the order of keywords and of dicts.

    Raises:
        UsageError: They have another structure.
    """
    leaves, found = pytree.tree_flatten((args, kwargs))
    if found == spec:
        return leaves
    try:
        return spec.flatten_up_to((args, kwargs))
    except ValueError as error:
        raise UsageError(f"called with ({_shown(found)}), the program takes ({_shown(spec)})") from error


class _Leaf:
    """Stands for a value in a structure that is shown."""

    def __repr__(self) -> str:
        return "*"


def _shown(spec: pytree.TreeSpec) -> str:
    """Arguments as one would write them, with stars for values."""
    args, kwargs = pytree.tree_unflatten([_Leaf()] * spec.num_leaves, spec)
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])


def describe(program: ExportedProgram, leaves: Iterable[object], written: set[str]) -> dict[str, Any]:
    """What the manifest states of the arguments and results of an exported program.

    Args:
        program: The program.
        leaves: The example arguments, flattened.
        written: Names of inputs that the program writes to.

    Raises:
        UnsupportedError: An argument is of a kind that a program cannot be held to, or a size depends on the inputs in
            a way that the manifest cannot state.
    """
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs: list[dict[str, Any]] = []
    arguments: list[Any] = []
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    for spec, value in zip(specs, leaves, strict=True):
        name = getattr(spec.arg, "name", "")
        if isinstance(spec.arg, TensorArgument) and isinstance(value, torch.Tensor):
            arguments.append("input")
            inputs.append({**_input(placeholders[name], value, name), "mutated": name in written})
        elif isinstance(spec.arg, ConstantArgument):
            arguments.append({"constant": constant(value, f"argument {name!r}")})
        else:
            kind = type(value).__name__
            hint = "pass it as a tensor without dimensions, or leave its dynamic_shapes entry out"
            raise UnsupportedError(f"argument {name!r} is a {kind} that varies, which no program takes", hint=hint)
    dynamic = _Sizes(program, inputs)
    return {
        "inputs": inputs,
        "leaves": arguments,
        "outputs": _outputs(program),
        "symbols": dynamic.symbols,
        "guards": dynamic.guards,
    }


def _input(placeholder: Any, value: torch.Tensor, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": dtype_name(value.dtype),
        "shape": [size_of(size) for size in placeholder.shape],
        "strides": [size_of(size) for size in placeholder.stride()],
        "device": str(value.device.type),
    }


def _outputs(program: ExportedProgram) -> list[Any]:
    """One row for each leaf of the results.

    Raises:
        UnsupportedError: One is of a kind that no program gives.
    """
    rows: list[Any] = []
    for spec in program.graph_signature.output_specs:
        if spec.kind != OutputKind.USER_OUTPUT:
            continue
        if isinstance(spec.arg, TensorArgument):
            rows.append("tensor")
        elif isinstance(spec.arg, ConstantArgument):
            rows.append({"constant": constant(spec.arg.value, "a result")})
        elif isinstance(spec.arg, SymIntArgument | SymFloatArgument | SymBoolArgument):
            rows.append("number")
        else:
            raise UnsupportedError(f"a result is a {type(spec.arg).__name__}, which no program gives")
    return rows


class _Sizes:
    """The sizes that may vary, with what must be true of them."""

    def __init__(self, program: ExportedProgram, inputs: list[dict[str, Any]]) -> None:
        self.symbols: dict[str, Any] = {}
        self.guards: list[Any] = []
        named = {size for row in inputs for size in row["shape"] if isinstance(size, str)}
        used = {name for row in inputs for size in (*row["shape"], *row["strides"]) for name in _names(size)}
        if missing := used - named:
            raise UnsupportedError(
                f"the size {missing.pop()} is no dimension of an input by itself",
                hint="make the dimension that others follow from a dynamic dimension of an input",
            )
        for symbol, bounds in program.range_constraints.items():
            if str(symbol) in named:
                most = bounds.upper
                largest = int(most) if isinstance(most, sympy.Integer | int) else None
                self.symbols[str(symbol)] = {"min": int(bounds.lower), "max": largest}
        if named - self.symbols.keys():
            raise UnsupportedError(f"torch states no range for the size {(named - self.symbols.keys()).pop()}")
        for guard in map(size_of, _guards(program) if named else ()):
            if unknown := _names(guard) - named:
                raise UnsupportedError(f"torch assumed something of {unknown.pop()}, which is no dimension of an input")
            if guard != 1 and guard not in self.guards:
                self.guards.append(guard)


def _guards(program: ExportedProgram) -> list[sympy.Basic]:
    """What export assumed of the sizes, beside their ranges."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        environment = getattr(getattr(value, "fake_mode", None), "shape_env", None)
        if environment is not None:
            return [environment.simplify(guard.expr) for guard in environment.guards]
    return []


def size_of(value: Any) -> Any:
    """A size as the manifest states it: a number, a symbol's name, or an operation.

    Raises:
        UnsupportedError: The manifest has no such operation.
    """
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, bool | sympy.logic.boolalg.BooleanAtom):
        return int(bool(value))
    if isinstance(value, int | sympy.Integer):
        return int(value)
    if isinstance(value, sympy.Symbol):
        return str(value)
    operation = _OPERATIONS.get(type(value).__name__)
    if operation is None:
        raise UnsupportedError(f"a size is {value}, whose {type(value).__name__} the manifest cannot state")
    return {"op": operation, "of": [size_of(part) for part in value.args]}


def _names(size: Any) -> set[str]:
    if isinstance(size, str):
        return {size}
    return set().union(*map(_names, size["of"])) if isinstance(size, dict) else set()


def constant(value: object, what: str) -> dict[str, str]:
    """A value that is no tensor, exactly, as text.

    Raises:
        UnsupportedError: It is of a type that has no such text.
    """
    kind = type(value)
    if kind not in {bool, int, float, str, type(None)}:
        raise UnsupportedError(f"{what} is a {kind.__name__}; tensors, numbers, texts and None are taken")
    return {"type": kind.__name__, "value": value.hex() if isinstance(value, float) else str(value)}


def value_of(stated: dict[str, str]) -> Any:
    """The value that `constant` made a text of."""
    kind, text = stated["type"], stated["value"]
    if kind == "bool":
        return text == "True"
    if kind == "float":
        return float.fromhex(text)
    return {"int": int, "str": str}.get(kind, lambda _: None)(text)
