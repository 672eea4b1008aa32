"""Between torch tensors and checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from reweft import _core
from reweft.checkpoint import Checkpoint
from reweft.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from reweft.checkpoint import TensorInfo

__all__ = [
    "checkpoint_of",
    "dtype_name",
    "dtype_of",
    "held_tensors",
    "identity",
    "is_plain_type",
    "mapped_tensors",
    "raw",
    "tensor",
]

# Types whose instances are their bytes, shape and strides, and nothing else.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def raw(value: torch.Tensor) -> bytes:
    """The bytes of a dense tensor in row-major order. Copies them."""
    flat = value.detach().contiguous().reshape(-1)
    # One element counts as contiguous whatever its stride, which a view as bytes minds.
    flat = flat.as_strided((flat.numel(),), (1,))
    data: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return data


def tensor(info: TensorInfo) -> torch.Tensor:
    """Make a torch tensor of a checkpoint's tensor, in row-major order.

    Copies the bytes once, so that the tensor may be written to.

    Raises:
        UnsupportedError: The installed torch has no such dtype.
        FormatError: The file is truncated or damaged.
        IoError: It cannot be read.
    """
    made = torch.empty(info.shape, dtype=dtype_of(info), device="cpu")
    info._checkpoint.fill([info.key], [made], cast=False)  # noqa: SLF001  (one package)
    return made


def dtype_of(info: TensorInfo) -> torch.dtype:
    """The dtype of a checkpoint's tensor.

    Raises:
        UnsupportedError: The installed torch has no such dtype.
    """
    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedError(f"{info.key!r}: torch {torch.__version__} has no dtype {info.dtype}", key=info.key)
    return dtype


def mapped_tensors(infos: Iterable[TensorInfo]) -> dict[str, torch.Tensor]:
    """Make torch tensors of one checkpoint's tensors, over a private mapping of its file.

    They may be written to: a page is copied when it is written first, and the file never changes. Shared storages and
    strides are kept. CRCs are compared; no byte is copied, but of tensors that do not lie in the file as they are
    (packed, made by a key map, in memory, of the other byte order) or not at a multiple of their element's size.

    Raises:
        UnsupportedError: The installed torch has no such dtype.
        FormatError: The file is truncated or damaged.
        IoError: It cannot be read.
    """
    infos = list(infos)
    held = {info.storage: info._checkpoint for info in infos if info.nbytes}  # noqa: SLF001  (one package)
    buffers = next(iter(held.values())).map_privately(list(held)) if held else []
    storages = {
        number: torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
        for number, buffer in zip(held, buffers, strict=True)
        if buffer is not None
    }
    return {info.key: _in_storage(info, storages.get(info.storage)) for info in infos}


def _in_storage(info: TensorInfo, storage: torch.UntypedStorage | None) -> torch.Tensor:
    dtype = dtype_of(info)
    if storage is None or not info.nbytes or storage.data_ptr() % dtype.itemsize:
        return tensor(info)
    made = torch.empty(0, dtype=dtype, device="cpu")
    return made.set_(storage, info.storage_offset, info.shape, info.strides)


def is_plain_type(kind: type) -> bool:
    """Whether tensors of a class are their bytes, shape and strides, and nothing else."""
    return kind in _PLAIN


def checkpoint_of(
    state_dict: Mapping[str, torch.Tensor], name: str = "state_dict", *, metadata: Mapping[str, str] | None = None
) -> Checkpoint:
    """See tensors in memory as a checkpoint: same checks, shared storages and strides kept, no byte copied.

    The checkpoint reads the tensors' own memory; do not change them while it is in use. `replace_weights(copy=False)`
    makes a model use it too, and says what that asks of the caller.

    Args:
        state_dict: Keys and tensors. They must be on the CPU, dense and not quantised; wrapper subclasses
            (DTensor, quantised weights) are refused.
        name: Stands for the file in messages.
        metadata: Texts that safetensors files keep beside the tensors.

    Raises:
        UnsupportedError: A value is not such a tensor; the message names the key.

    Example:
        >>> checkpoint_of({"a": torch.zeros(2, 3)})["a"].shape
        (2, 3)
    """
    plain = {key: _plain(key, value, name) for key, value in state_dict.items()}
    pairs = None if metadata is None else list(metadata.items())
    return Checkpoint(_core.Checkpoint.from_tensors(Path(name), list(plain), list(plain.values()), metadata=pairs))


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
    if not is_plain_type(type(value)):
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


def identity(fqn: str, value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for names of one tensor. Empty tensors have no address to be told apart by, so each is its own."""
    if value.numel() == 0:
        return (fqn,)
    where = (value.untyped_storage().data_ptr(), value.storage_offset())
    return (*where, tuple(value.shape), value.stride(), value.dtype)
