"""Calls of a compiled program: arguments are held against what it was compiled for, results get their structure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from reweft.errors import MismatchError, UsageError
from reweft.torch.signature import constant, flatten, value_of
from reweft.torch.tensors import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from reweft import _core

__all__ = ["Batches", "Call", "Input"]

RunChunks: TypeAlias = "Callable[[list[list[torch.Tensor]]], list[list[Any]]]"
"""Runs the program once for each list of inputs."""


class Call:
    """How one program is called."""

    def __init__(self, core: _core.Model) -> None:
        in_spec, out_spec = core.call_spec()
        stated = json.loads(core.signature())
        self._in_spec = pytree.treespec_loads(in_spec)
        self._out_spec = pytree.treespec_loads(out_spec)
        self._dynamic = bool(stated["symbols"])
        self.inputs = [Input(row, number) for number, row in enumerate(stated["inputs"])]
        rows = iter(self.inputs)
        self._leaves = [next(rows) if leaf == "input" else leaf["constant"] for leaf in stated["leaves"]]
        self.outputs = stated["outputs"]
        self._is_single = self._out_spec.is_leaf() and self.outputs == ["tensor"]
        # Nothing but tensors, one after the other: the structure is the tuple itself.
        self.is_flat = len(self.inputs) == len(self._leaves) and self._in_spec == _flat_spec(len(self._leaves))

    def arguments(self, core: _core.Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The program's inputs.

        Raises:
            UsageError: The arguments have another structure than the examples had.
            MismatchError: One has another dtype, shape, device or value than the program was compiled for.
        """
        given = self.tensors(args, kwargs)
        rows = zip(self.inputs, given, strict=True)
        if not self._dynamic:
            return [wanted.fit(value, wanted.shape, wanted.strides) for wanted, value in rows]
        expected = core.expect([list(value.shape) for value in given])
        return [
            wanted.fit(value, tuple(shape), tuple(strides))
            for (wanted, value), (shape, strides) in zip(rows, expected, strict=True)
        ]

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors among the arguments, of any shape.

        Raises:
            UsageError: The arguments have another structure than the examples had.
            MismatchError: A tensor has another dtype or device, or a value that is none is another one.
        """
        is_flat = self.is_flat and not kwargs and len(args) == len(self.inputs)
        if is_flat and all(isinstance(value, torch.Tensor) for value in args):
            leaves: Iterable[Any] = args
        else:
            leaves = flatten(self._in_spec, args, kwargs)
        given = []
        for number, (wanted, value) in enumerate(zip(self._leaves, leaves, strict=True)):
            if isinstance(wanted, Input):
                given.append(wanted.check(value))
            elif (found := _stated(value, wanted, number)) != wanted:
                raise MismatchError(
                    f"argument {self._path(number)} is {found['value']} ({found['type']}), and was compiled in as "
                    f"{wanted['value']} ({wanted['type']})",
                    hint="trace the module once for each value",
                )
        return given

    def structured(self, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the module, with these tensors for the program's inputs."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(wanted, Input) else value_of(wanted) for wanted in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        return tuple(args), dict(kwargs)

    def results(self, tensors: list[torch.Tensor | None]) -> Any:
        """What the program gave, in the structure that the module gives."""
        if self._is_single:
            return tensors[0]
        leaves: list[Any] = []
        for stated, tensor in zip(self.outputs, tensors, strict=True):
            if stated == "tensor":
                leaves.append(tensor)
            elif stated == "number":
                leaves.append(None if tensor is None else tensor.item())
            else:
                leaves.append(value_of(stated["constant"]))
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _path(self, number: int) -> str:
        """Where an argument is, as one would write it."""
        numbers = pytree.tree_unflatten(range(len(self._leaves)), self._in_spec)
        path = next(path for path, leaf in pytree.tree_flatten_with_path(numbers)[0] if leaf == number)
        return pytree.keystr(path[1:])


class Batches:
    """How one program's calls are cut."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._size = int(call.inputs[0].shape[0])

    def run(self, run_chunks: RunChunks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result for any number of rows.

        Raises:
            MismatchError: The inputs differ in their first dimension, or in another one from what was compiled.
        """
        given = self._call.tensors(args, kwargs)
        rows = self._rows(given)
        inputs = list(zip(self._call.inputs, given, strict=True))
        chunks = [
            [wanted.fit(self._chunk(value, start), wanted.shape, wanted.strides) for wanted, value in inputs]
            for start in range(0, max(rows, 1), self._size)
        ]
        results = run_chunks(chunks)
        # What is no tensor is the same for every chunk.
        joined = [
            torch.cat([chunk[number] for chunk in results]).narrow(0, 0, rows) if stated == "tensor" else None
            for number, stated in enumerate(self._call.outputs)
        ]
        return self._call.results(joined)

    def _rows(self, given: list[torch.Tensor]) -> int:
        first = self._call.inputs[0]
        rows = int(given[0].shape[0]) if given[0].dim() else 0
        for wanted, value in zip(self._call.inputs, given, strict=True):
            if value.dim() != len(wanted.shape):
                raise MismatchError(
                    f"input {wanted.name!r} has {value.dim()} dimensions, the program takes {len(wanted.shape)}"
                )
            if value.shape[0] != rows:
                found = f"dim 0 is {value.shape[0]}, that of input {first.name!r} is {rows}"
                raise MismatchError(f"input {wanted.name!r}: {found}", hint="all inputs have the batch in dim 0")
            for dim in range(1, value.dim()):
                if value.shape[dim] != wanted.shape[dim]:
                    found = f"dim {dim} is {value.shape[dim]}, the program takes {wanted.shape[dim]}"
                    raise MismatchError(f"input {wanted.name!r}: {found}")
        return rows

    def _chunk(self, value: torch.Tensor, start: int) -> torch.Tensor:
        """Some rows, with the last one repeated where there are too few."""
        rows = min(self._size, value.shape[0] - start)
        if rows == self._size:
            return value.narrow(0, start, rows)
        if rows <= 0:
            return value.new_zeros((self._size, *value.shape[1:]))
        last = value.narrow(0, value.shape[0] - 1, 1).expand(self._size - rows, *value.shape[1:])
        return torch.cat([value.narrow(0, start, rows), last])


class Input:
    """One input as it was when the program was compiled."""

    def __init__(self, row: dict[str, Any], number: int) -> None:
        self.name: str = row["name"]
        self.number = number
        self.mutated: bool = row["mutated"]
        self.dtype: str = row["dtype"]
        # Sizes that vary are texts or operations.
        self.shape = tuple(row["shape"])
        self.strides = tuple(row["strides"])
        self.device: str = row["device"]
        self.torch_dtype: torch.dtype = getattr(torch, self.dtype)
        self.is_float = self.torch_dtype.is_floating_point or self.torch_dtype.is_complex

    def check(self, value: object) -> torch.Tensor:
        """The tensor, if it is one, and of the kind that the program takes.

        Raises:
            UsageError: It is no tensor.
            MismatchError: It has another dtype, layout or device.
        """
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"input {self.name!r} is a {type(value).__name__}, the program takes a tensor")
        if value.dtype != self.torch_dtype or value.device.type != self.device or value.layout != torch.strided:
            self._refuse(value)
        return value

    def fit(self, value: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """The tensor itself, or a copy of it with the compiled strides.

        Raises:
            MismatchError: It has another shape.
        """
        if value.shape != shape:
            self._refuse(value)
        held = value.detach() if value.requires_grad else value
        if held.is_conj() or held.is_neg():
            held = held.resolve_conj().resolve_neg()
        if held.stride() == strides:
            return held
        if self.mutated:
            found = f"strides {held.stride()}; the program writes to it and takes {strides}"
            raise MismatchError(f"input {self.name!r} has {found}")
        return torch.empty_strided(shape, strides, dtype=held.dtype, device=held.device).copy_(held)

    def _refuse(self, value: torch.Tensor) -> None:
        found = f"{dtype_name(value.dtype)} {list(value.shape)} ({value.layout}) on {value.device}"
        wanted = f"{self.dtype} {list(self.shape)} on {self.device}"
        raise MismatchError(f"input {self.name!r} is {found}, the program takes {wanted}")


def _flat_spec(count: int) -> pytree.TreeSpec:
    return pytree.tree_structure(((0,) * count, {}))


def _stated(value: object, wanted: dict[str, str], number: int) -> dict[str, str]:
    """A value as the manifest would state it.

    Raises:
        MismatchError: No program is compiled for such a value.
    """
    if type(value).__name__ != wanted["type"]:
        shown = value if isinstance(value, bool | int | float | str | None) else "no such value"
        return {"type": type(value).__name__, "value": str(shown)}
    return constant(value, f"argument {number}")
