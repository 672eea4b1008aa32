"""What is measured: a multi-layer perceptron with two sets of weights, compiled once for all topics."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import safetensors.torch
import torch

import reweft.torch as rt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYERS = 12
WIDTH = 1024
BATCH = 16

StateDict = dict[str, torch.Tensor]
Weights = TypeVar("Weights")


@dataclass(frozen=True)
class Subject:
    """A model in all the forms that the topics need."""

    folder: Path
    net: torch.nn.Module
    inputs: torch.Tensor
    package: Path
    states: tuple[StateDict, StateDict]
    checkpoints: tuple[Path, Path]
    safetensors: tuple[Path, Path]

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.states[0].values())


def make_net(seed: int, layers: int = LAYERS, width: int = WIDTH) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    pairs = ((torch.nn.Linear(width, width), torch.nn.ReLU()) for _ in range(layers))
    return torch.nn.Sequential(*itertools.chain.from_iterable(pairs)).eval()


def prepare(folder: Path) -> Subject:
    net, inputs = make_net(0), torch.randn(BATCH, WIDTH)
    states = (dict(net.state_dict()), dict(make_net(1).state_dict()))
    checkpoints = (folder / "a.pt", folder / "b.pt")
    tensors = (folder / "a.safetensors", folder / "b.safetensors")
    for state, checkpoint, path in zip(states, checkpoints, tensors, strict=True):
        torch.save(state, checkpoint)
        safetensors.torch.save_file(state, path)
    package = folder / "net.pt2"
    rt.save(rt.trace(net, inputs), package)
    return Subject(folder, net, inputs, package, states, checkpoints, tensors)


def compile_stock(net: torch.nn.Module, inputs: torch.Tensor, package: Path) -> None:
    """Compile as torch's documentation says, with its defaults."""
    with torch.no_grad():
        program = torch.export.export(net, (inputs,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))


def in_turn(pair: tuple[Weights, Weights]) -> Iterator[Weights]:
    """The two sets of weights again and again, so that every replacement changes something."""
    return itertools.cycle(pair[::-1])
