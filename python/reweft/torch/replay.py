"""Operations that torch carries out for the engine, when rows of frozen programs are made again.

The engine computes what IEEE 754 defines to the last bit. What it leaves to torch stands in a recipe by operator and
arguments: tensors by number, everything else as it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from reweft import _core
from reweft.errors import UnsupportedError
from reweft.torch.tensors import dtype_name, raw

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["arguments_of", "capability", "is_pure", "lend"]

# Values that JSON does not have: how they are told from others, written and read.
_TAGGED: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    torch.dtype: ("dtype", dtype_name, lambda name: getattr(torch, name)),
    torch.layout: ("layout", lambda value: str(value).removeprefix("torch."), lambda name: getattr(torch, name)),
    torch.memory_format: ("format", lambda value: str(value).removeprefix("torch."), lambda name: getattr(torch, name)),
    torch.device: ("device", str, torch.device),
}


def lend() -> None:
    """Let the engine use this module."""
    _core.lend_replay(_apply, str(torch.__version__), capability())


def capability() -> str:
    """What the last bits of torch's functions depend on here: its own vector functions, and whose processor it is.

    By the vendor MKL chooses its functions.
    """
    vendor = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        vendor = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), vendor)
    return f"{torch.backends.cpu.get_cpu_capability()} {vendor}"


def is_pure(operator: str) -> bool:
    """Whether a name is that of an operator that does nothing but compute tensors from tensors."""
    found = _find(operator)
    if found is None:
        return False
    schema = found._schema  # noqa: SLF001  (torch has no other name for it)
    takes_tensors = any(isinstance(argument.type, torch.TensorType | torch.ListType) for argument in schema.arguments)
    return takes_tensors and not schema.is_mutable and torch.Tag.nondeterministic_seeded not in found.tags


def _find(operator: str) -> Any:
    """An operator of torch's own; None if there is none."""
    namespace, _, name = operator.partition("::")
    name, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten if namespace == "aten" else torch.ops.prims, name, None)
    return getattr(packet, overload, None) if namespace in {"aten", "prims"} else None


def arguments_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], is_tensor: Callable[[object], bool]
) -> tuple[str, list[Any]]:
    """The text that stands for arguments, and the tensors among them, in order.

    Raises:
        TypeError: There is something else than values that torch's operators take.
    """
    tensors: list[Any] = []

    def plain(value: Any) -> Any:
        if is_tensor(value):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if type(value) not in _TAGGED:
            raise TypeError(f"an argument is a {type(value).__name__}")
        tag, write, _ = _TAGGED[type(value)]
        return {tag: write(value)}

    text = [plain(args), {name: plain(value) for name, value in kwargs.items()}]
    return json.dumps(text if kwargs else text[:1], separators=(",", ":")), tensors


def _apply(
    operator: str, arguments: str, result: int, operands: list[tuple[str, list[int], bytes]]
) -> tuple[str, list[int], bytes]:
    """Carry an operation out; tensors go and come as dtype, shape and bytes in row-major order.

    Raises:
        UnsupportedError: It is no operator, or does more than compute.
    """
    if not is_pure(operator):
        raise UnsupportedError(f"{operator} is no operator of torch's that only computes")
    tensors = [_tensor(*operand) for operand in operands]
    readers = {tag: read for tag, _, read in _TAGGED.values()}

    def value(read: Any) -> Any:
        if isinstance(read, list):
            return [value(item) for item in read]
        if not isinstance(read, dict):
            return read
        ((tag, of),) = read.items()
        return tensors[of] if tag == "tensor" else float(of) if tag == "float" else readers[tag](of)

    args, *rest = json.loads(arguments)
    kwargs = {name: value(of) for name, of in rest[0].items()} if rest else {}
    # Whatever the caller has switched on is not a part of the recipe.
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch._C.DisableTorchFunction():  # noqa: SLF001
        out = _find(operator)(*value(args), **kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)][result]
        made = made.resolve_conj().resolve_neg()
    return dtype_name(made.dtype), list(made.shape), raw(made)


def _tensor(dtype: str, shape: list[int], data: bytes) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if data else torch.empty(shape, dtype=kind)
