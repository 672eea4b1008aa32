"""Checkpoints to open and to convert: one of many small tensors, one of few large ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import safetensors.torch
import torch

if TYPE_CHECKING:
    from pathlib import Path

SMALL_TENSORS = 20_000
SMALL_SHAPE = (8, 4)
LARGE_TENSORS = 200
LARGE_SHAPE = (1280, 1024)


@dataclass(frozen=True)
class Files:
    """Each set of tensors as `torch.save` and as safetensors write it."""

    folder: Path
    small: Path
    small_safetensors: Path
    large: Path
    large_safetensors: Path

    @property
    def out(self) -> Path:
        """Where jobs put what they write."""
        return self.folder / "out.safetensors"


def prepare(folder: Path) -> Files:
    """Write the files; afterwards they are in the page cache."""
    files = Files(folder, *(folder / name for name in ("small.pt", "small.st", "large.pt", "large.st")))
    torch.manual_seed(0)
    small = {f"model.layers.{i // 100}.experts.{i % 100}.w": torch.randn(SMALL_SHAPE) for i in range(SMALL_TENSORS)}
    large = {f"model.layers.{i}.weight": torch.randn(LARGE_SHAPE) for i in range(LARGE_TENSORS)}
    for tensors, pt, st in (
        (small, files.small, files.small_safetensors),
        (large, files.large, files.large_safetensors),
    ):
        torch.save(tensors, pt)
        safetensors.torch.save_file(tensors, st)
    return files
