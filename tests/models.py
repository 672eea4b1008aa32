"""Small modules, one for each thing that a refit can get wrong. Their weights follow from a seed."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def seeded(kind: type[ModuleT], seed: int) -> ModuleT:
    """A module in eval mode, every float parameter and buffer of which differs between seeds."""
    torch.manual_seed(seed)
    module = kind().eval()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
                norm.weight.uniform_(0.5, 2.0)
                norm.bias.normal_()
    return module


class Digits(nn.Module):
    """Convolutions with BatchNorm of 3 and of 16 channels, a 4-wide bias and 0-dim and 1-element parameters.

    By default AOTInductor writes all but the 16-channel weights into the code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 16, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.randn(()))
        self.shift = nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x))).mean((2, 3))
        out: torch.Tensor = self.fc(x) * self.scale.exp() + self.shift
        return out


class Tied(nn.Module):
    """One weight under two names, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(tokens))
        return out


class Mixed(nn.Module):
    """Buffers of other dtypes and kinds, a tensor attribute, weights that are not contiguous, nested outputs."""

    phase: torch.Tensor
    order: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64))
        self.register_buffer("order", torch.randperm(6))
        self.register_buffer("window", torch.randn(6), persistent=False)
        self.offset = torch.randn(6)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        row = x[:, 0, 0, :]
        return {
            "conv": self.conv(x),
            "pair": (row[:, self.order], row * self.window),
            "phase": torch.view_as_real(row[:, :4].to(torch.complex64) * self.phase),
            "nothing": None,
            "list": [row + self.offset],
            "buffer": self.window,
        }


class Views(nn.Module):
    """Weights that are views of larger storages, and buffers of the dtypes that `Mixed` lacks."""

    first: torch.Tensor
    second: torch.Tensor
    mask: torch.Tensor
    wide: torch.Tensor
    nibbles: torch.Tensor
    count: torch.Tensor
    nothing: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.slice = nn.Parameter(torch.randn(10)[3:7])
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        flat = torch.randn(8)
        self.register_buffer("first", flat[:4])
        self.register_buffer("second", flat[4:])
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("wide", torch.randn(4, dtype=torch.float64))
        self.register_buffer("nibbles", torch.randint(0, 16, (4,), dtype=torch.uint8))
        self.register_buffer("count", torch.randint(1, 99, (), dtype=torch.int32))
        self.register_buffer("nothing", torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        views = [x * self.slice, x @ self.transposed.t(), x * self.first, x * self.second]
        others = [torch.where(self.mask, x, 0), x * self.wide, x * self.nibbles, x * self.count]
        return [*views, *others, torch.cat([x, self.nothing])]


class HalfWidth(nn.Module):
    """A bfloat16 module, as checkpoints are served."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4)
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


class Counter(nn.Module):
    """Buffers that the program writes to, as a KV cache is."""

    total: torch.Tensor
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.total.add_(x)
        self.calls.add_(1)
        return self.total * self.weight, self.calls + 0


class Recurrent(nn.Module):
    """An LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rnn(x)[0]
        return out


class Weightless(nn.Module):
    """Two inputs, no weights."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, x @ y.T


class Small(nn.Module):
    """A weight that stays a constant by default, and a bias that the compiler writes into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x)
        return out
