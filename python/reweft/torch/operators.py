"""Operators that a compiled program leaves to its host: those that have no C function, such as custom ones.

The package names them with their arguments in a JSON text, in the order in which the generated code counts them
(`ExternKernelNodes` in `torch/_export/serde/schema.py`, 2.13 to 2.15). Tensors, and integers that may vary, come with
each call; all other arguments stand in the text.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._export.serde import serialize

from reweft.errors import RunError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Operators"]

# Arguments that stand in the text, by the tag that says what they are.
_STATIC: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_bool": bool,
    "as_bools": list,
    "as_float": float,
    "as_floats": list,
    "as_string": str,
    "as_strings": list,
    "as_complex": lambda value: complex(value["real"], value["imag"]),
    "as_device": lambda value: torch.device(value["type"], value.get("index")),
    "as_scalar_type": lambda code: serialize._SERIALIZE_TO_TORCH_DTYPE[code],  # noqa: SLF001  (stated nowhere else)
    "as_layout": lambda code: serialize._SERIALIZE_TO_TORCH_LAYOUT[code],  # noqa: SLF001
    "as_memory_format": lambda code: serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT[code],  # noqa: SLF001
}
# Those that come with a call, from its integers and its tensors.
_PASSED: dict[str, Callable[[Any, Iterator[int], Iterator[Any]], Any]] = {
    "as_int": lambda _, numbers, __: next(numbers),
    "as_sym_int": lambda _, numbers, __: next(numbers),
    "as_ints": lambda held, numbers, _: [next(numbers) for _ in held],
    "as_sym_ints": lambda held, numbers, _: [next(numbers) for _ in held],
    "as_tensor": lambda _, __, tensors: next(tensors),
    "as_tensors": lambda held, _, tensors: [next(tensors) for _ in held],
    "as_optional_tensors": lambda held, _, tensors: [next(tensors) if _is_tensor(item) else None for item in held],
}
# Schema types whose integers come with a call, also where the text states one.
_VARYING = (torch.IntType, torch.SymIntType, torch.NumberType)


class Operators:
    """The operators of one program.

    Raises:
        UnsupportedError: One is not registered in this process, or takes what cannot be passed.
    """

    num_inputs: list[int]
    """How many tensors each takes."""
    names: list[str]

    def __init__(self, nodes: str) -> None:
        self._nodes = [_Node(node["node"]) for node in json.loads(nodes)["nodes"]]
        self.num_inputs = [node.num_inputs for node in self._nodes]
        self.names = [node.name for node in self._nodes]

    def run(self, number: int, numbers: list[int], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run one; gives its results."""
        return self._nodes[number].run(iter(numbers), iter(inputs))


class _Node:
    """One operator and its arguments."""

    def __init__(self, node: dict[str, Any]) -> None:
        self.name = node["target"]
        self._call = _operator(self.name)
        given = {item["name"]: item["arg"] for item in node["inputs"]}
        schema = [argument for argument in self._call._schema.arguments if argument.name in given]  # noqa: SLF001
        # In the order of the schema, in which the generated code passes them.
        self._arguments = [(item.name, item.kwarg_only, self._argument(item, given[item.name])) for item in schema]
        self._outputs = [_tagged(output) for output in node["outputs"]]
        self.num_inputs = sum(_num_tensors(*_tagged(value)) for value in given.values())

    def _argument(self, argument: Any, value: dict[str, Any]) -> Callable[[Iterator[int], Iterator[Any]], Any]:
        """Takes an argument from what a call brings, or gives the one that the text states.

        Raises:
            UnsupportedError: It can be neither.
        """
        tag, held = _tagged(value)
        if tag in {"as_int", "as_ints"} and not _varies(argument.real_type):
            return lambda *_: held
        if tag in _PASSED:
            return partial(_PASSED[tag], held)
        if tag in _STATIC:
            constant = _STATIC[tag](held)
            return lambda *_: constant
        raise UnsupportedError(
            f"operator {self.name}: its argument {argument.name!r} is of a kind ({tag}) that no call passes"
        )

    def run(self, numbers: Iterator[int], tensors: Iterator[Any]) -> list[torch.Tensor]:
        # Whoever calls the program may be in a region that would compute this operator otherwise than the rest of it.
        with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001  (of every device)
            taken = [(name, by_name, take(numbers, tensors)) for name, by_name, take in self._arguments]
            positional = [value for _, by_name, value in taken if not by_name]
            made = self._call(*positional, **{name: value for name, by_name, value in taken if by_name})
        results = [] if not self._outputs else [made] if len(self._outputs) == 1 else list(made)
        return list(self._results(results, numbers))

    def _results(self, results: list[Any], numbers: Iterator[int]) -> Iterator[torch.Tensor]:
        """The tensors among the results, held against what the program expects.

        Raises:
            RunError: They are others than when it was compiled.
        """
        if len(results) != len(self._outputs):
            raise RunError(f"operator {self.name} gave {len(results)} results, the program takes {len(self._outputs)}")
        for number, ((tag, held), result) in enumerate(zip(self._outputs, results, strict=True)):
            count = _num_tensors(tag, held)
            found = result if isinstance(result, (list, tuple)) else [] if result is None else [result]
            if tag == "as_int":
                fits = result == next(numbers)
            else:
                fits = len(found) == count and all(isinstance(value, torch.Tensor) for value in found)
            if not fits:
                raise RunError(f"result {number} of operator {self.name} is another than when the program was compiled")
            if tag != "as_int":
                yield from found
        if (left := len(list(numbers))) > 0:
            raise RunError(f"operator {self.name}: the program passes {left} integers more than it says")


def _operator(name: str) -> Any:
    """The operator of a name such as `aten::median.dim`.

    Raises:
        UnsupportedError: There is none in this process.
    """
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, space), base), overload or "default")
    except (AttributeError, RuntimeError):
        raise UnsupportedError(
            f"the program needs the operator {name}, which is not registered in this process",
            hint="import the module that defines it before you load the model",
        ) from None


def _tagged(value: dict[str, Any]) -> tuple[str, Any]:
    """What an argument is and its value; an optional tensor is one or none."""
    tag, held = next((tag, held) for tag, held in value.items() if held is not None or len(value) == 1)
    return _tagged(held) if tag == "as_optional_tensor" else (tag, held)


def _is_tensor(value: dict[str, Any]) -> bool:
    return _tagged(value)[0] == "as_tensor"


def _num_tensors(tag: str, held: Any) -> int:
    if tag == "as_optional_tensors":
        return sum(map(_is_tensor, held))
    return len(held) if tag == "as_tensors" else int(tag == "as_tensor")


def _varies(kind: Any) -> bool:
    """Whether integers of a schema type come with the call."""
    while isinstance(kind, (torch.OptionalType, torch.ListType)):
        kind = kind.getElementType()
    return isinstance(kind, _VARYING)
