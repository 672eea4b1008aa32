"""Between torch tensors and checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from reweft import _core
from reweft.checkpoint import Checkpoint
from reweft.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reweft.checkpoint import TensorInfo

__all__ = ["checkpoint_of", "dtype_name", "held_tensors", "tensor"]


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def tensor(info: TensorInfo) -> torch.Tensor:
    """Make a torch tensor of a checkpoint's tensor, in row-major order.

    Copies the bytes once, so that the tensor may be written to.

    Raises:
        UnsupportedError: The installed torch has no such dtype.
        FormatError: The file is truncated or damaged.
        IoError: It cannot be read.
    """
    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedError(f"{info.key!r}: torch {torch.__version__} has no dtype {info.dtype}")
    made = torch.empty(info.shape, dtype=dtype)
    if info.nbytes:
        made.view(-1).view(torch.uint8).numpy()[:] = info.read()
    return made


def checkpoint_of(state_dict: Mapping[str, torch.Tensor], name: str = "state_dict") -> Checkpoint:
    """See tensors in memory as a checkpoint: same checks, shared storages and strides kept, no byte copied.

    The checkpoint reads the tensors' own memory; do not change them while it is in use. `replace_weights(copy=False)`
    makes a model use it too, and says what that asks of the caller.

    Args:
        state_dict: Keys and tensors. They must be on the CPU, dense and not quantised; wrapper subclasses
            (DTensor, quantised weights) are refused.
        name: Stands for the file in messages.

    Raises:
        UnsupportedError: A value is not such a tensor; the message names the key.

    Example:
        >>> checkpoint_of({"a": torch.zeros(2, 3)})["a"].shape
        (2, 3)
    """
    plain = {key: _plain(key, value, name) for key, value in state_dict.items()}
    return Checkpoint(_core.Checkpoint.from_tensors(Path(name), list(plain), list(plain.values())))


def held_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that modules hold in lists, tuples and dicts, with their dotted path."""
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name.startswith("_") or not isinstance(value, list | tuple | dict):
                continue
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                if isinstance(leaf, torch.Tensor):
                    steps = [str(getattr(step, "key", getattr(step, "idx", step))) for step in path]
                    yield ".".join([prefix, name, *steps] if prefix else [name, *steps]), leaf


def _plain(key: str, value: object, name: str) -> torch.Tensor:
    """The tensor itself, if its bytes are all there is to it.

    Raises:
        UnsupportedError: They are not.
    """
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"{name}: {key!r}: a {type(value).__name__}, not a tensor", key=key)
    if type(value) not in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}:
        raise UnsupportedError(f"{name}: {key!r}: a tensor subclass, {type(value).__name__}", key=key)
    if not value.is_cpu:
        what = f"{name}: {key!r}: a tensor on {value.device}, wanted cpu"
        raise UnsupportedError(what, key=key, hint="move it with .cpu() first")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        kind = "quantised" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
        raise UnsupportedError(f"{name}: {key!r}: a {kind} tensor, wanted a dense one", key=key)
    # Pending conjugation and negation are bits of the tensor, not of its bytes.
    if value.is_conj() or value.is_neg():
        return value.detach().resolve_conj().resolve_neg()
    return value
