"""What there is to a tensor beside its bytes, and in which memory it lies."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from reweft.torch.tensors import dtype_name, is_plain_type

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "describe",
    "handles_loading",
    "is_bytes",
    "is_dense_bytes",
    "is_tensor",
    "kind_of",
    "overlaps",
    "same_bytes",
]


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor, or stands for one as torch's functions see it."""
    return bool(torch.overrides.is_tensor_like(value))  # type: ignore[no-untyped-call]


def is_bytes(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is all there is to it: dense, on the CPU, no subclass, nothing pending."""
    return (
        is_plain_type(type(tensor))
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not tensor.is_inference()
    )


def is_dense_bytes(tensor: torch.Tensor) -> bool:
    """Whether the engine may write to a tensor's memory: each byte of it once."""
    if not is_bytes(tensor):
        return False
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    steps = accumulate((size for _, size in dims), operator.mul, initial=1)
    return tensor.numel() == 0 or all(stride == step for (stride, _), step in zip(dims, steps, strict=False))


def handles_loading(tensor: Any) -> bool:
    """Whether a subclass sees calls of torch's functions, `Tensor.module_load` among them."""
    function = getattr(type(tensor), "__torch_function__", None)
    usual = {torch.Tensor.__torch_function__.__func__}  # type: ignore[attr-defined]
    disabled = function is torch._C._disabled_torch_function_impl  # noqa: SLF001
    return not disabled and getattr(function, "__func__", function) not in usual


def kind_of(tensor: torch.Tensor) -> str:
    """What a tensor is beside its bytes, as messages state it; `Tensor` if nothing."""
    kind = type(tensor)
    is_usual = kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not handles_loading(tensor)
    if is_plain_type(kind) or is_usual:
        layout = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
        return "Tensor" if layout == "torch.strided" else f"{layout} tensor"
    return kind.__name__


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are alike to the bit: NaN equals itself, and zero is not minus zero."""

    def elements(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)

    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    one, other = elements(left), elements(right)
    # Eight bytes at a time take an eighth of the time.
    begins = (one.storage_offset() * one.itemsize, other.storage_offset() * other.itemsize, one.nbytes)
    wide = torch.int64 if all(begin % 8 == 0 for begin in begins) else torch.uint8
    return torch.equal(one.view(wide), other.view(wide))


def overlaps(tensors: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Names of what may share memory: of `tensors` with anything else, and of `others` with one of `tensors`."""
    spans = []
    for is_other, group in ((False, tensors), (True, others)):
        objects: dict[int, list[str]] = {}
        for name, tensor in group.items():
            objects.setdefault(id(tensor), []).append(name)
        held = [(group[names[0]], names) for names in objects.values()]
        spans += [(*_span(tensor), is_other, names) for tensor, names in held if tensor.numel()]
    shared: tuple[set[str], set[str]] = (set(), set())
    reaching: list[tuple[int, bool, list[str]]] = []
    for start, end, is_other, names in sorted(spans, key=lambda span: span[:2]):
        reaching = [span for span in reaching if span[0] > start]
        for _, kind, before in reaching:
            if not (kind and is_other):
                shared[is_other].update(names)
                shared[kind].update(before)
        reaching.append((end, is_other, names))
    return shared


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor's elements, and the one behind the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize


def describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Dtype and shape as messages state them."""
    return f"{dtype_name(dtype)} {list(shape)}"
