"""Modules that are not compiled, and how their weights are saved and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import reweft.torch as rt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.complex128, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.inner(x))
        return out


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.history: list[int] = [0]

    def get_extra_state(self) -> list[int]:
        return self.history

    def set_extra_state(self, state: list[int]) -> None:
        self.history[:] = state
        if 13 in state:
            raise ValueError("unlucky")


def make(seed: int = 0) -> nn.Module:
    """Layers of several kinds: strided convolutions, running statistics, a tied pair, a recurrent layer."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm1d(4)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.num_batches_tracked.fill_(seed)  # type: ignore[union-attr]
    return nn.ModuleDict({"conv": conv, "norm": norm, "tied": Tied(), "rnn": nn.LSTM(2, 3)})


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def bits(tensor: torch.Tensor) -> bytes:
    row = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return row.view(torch.uint8).numpy().tobytes()


def assert_equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        other = right[key]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), key
        assert bits(value) == bits(other), key


def save(tensors: dict[str, Any], folder: Path, kind: str) -> Path:
    path = folder / f"weights.{kind}"
    if kind == "pt":
        torch.save(tensors, path)
    else:
        rt.save_file({key: value.clone() for key, value in tensors.items()}, path)
    return path
