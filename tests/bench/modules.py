"""Weights of 1 GB into a live module: seconds, and memory beyond the module's own."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

import reweft.torch as rt

from .files import LARGE_SHAPE, LARGE_TENSORS
from .processes import script
from .rows import Row
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from pathlib import Path

    from .files import Files

ROUNDS = 7
FLOOR = "floor: pread of each tensor into the parameter"

# The module has its memory before anything is counted; `5` makes the peak start again.
MEMORY = """
import sys
import torch, safetensors.torch
import reweft.torch as rt
from tests.bench.modules import make
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
net, path = make(), sys.argv[1]
{warm}
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
{load}
print(held("VmHWM") - before)
"""


class Layers(nn.Module):
    """The tensors of the large files, as parameters."""

    def __init__(self) -> None:
        super().__init__()
        rows, columns = LARGE_SHAPE
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(LARGE_TENSORS))


def make() -> nn.Module:
    return nn.ModuleDict({"model": Layers()}).requires_grad_(requires_grad=False)


def rows(files: Files) -> list[Row]:
    net = make()
    stock = {
        "pt": ("torch.load", lambda: net.load_state_dict(torch.load(files.large, weights_only=True))),
        "safetensors": ("load_file", lambda: net.load_state_dict(safetensors.torch.load_file(files.large_safetensors))),
    }
    found: list[Row] = []
    for path, kind in ((files.large_safetensors, "safetensors"), (files.large, "pt")):
        places = (_safetensors_places if kind == "safetensors" else _pt_places)(path)
        name, peer = stock[kind]
        jobs = {
            "ours": Job(lambda path=path: rt.load_into(net, path)),  # type: ignore[misc]
            "floor": Job(lambda path=path, places=places: _pread(net, path, places)),  # type: ignore[misc]
            "peer": Job(peer),
        }
        seconds = median_seconds(jobs, rounds=ROUNDS)
        what = f"load 1.05 GB of {kind} into a module"
        found += [
            Row(what, seconds["ours"], seconds["floor"], f"{FLOOR}; bar: 1.2 times"),
            Row(what, seconds["ours"], seconds["peer"], f"{name} + load_state_dict"),
            Row(f"{what}: memory beside it", *_memory(path, kind), f"{name} + load_state_dict", "MB"),
        ]
    return found


def _memory(path: Path, kind: str) -> tuple[float, float]:
    """The most memory beyond the module's own, of us and of torch."""
    read = "torch.load(path, weights_only=True)" if kind == "pt" else "safetensors.torch.load_file(path)"
    lines = ("rt.load_into(net, path)", f"net.load_state_dict({read})")
    warm = "torch.zeros(1 << 20).copy_(torch.ones(1 << 20))"
    ours, peer = (1024 * int(script(MEMORY.format(warm=warm, load=line), path)) / 1e6 for line in lines)
    return ours, peer


def _pread(net: nn.Module, path: Path, places: dict[str, int]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        for name, parameter in net.named_parameters():
            room: Any = parameter.view(-1).view(torch.uint8).numpy()
            assert os.preadv(file, [room], places[name]) == room.nbytes
    finally:
        os.close(file)


def _safetensors_places(path: Path) -> dict[str, int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}


def _pt_places(path: Path) -> dict[str, int]:
    """Where the records are. `torch.save` numbers them in the order of the tensors."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            folder, _, number = entry.filename.rpartition("/")
            if folder.endswith("/data"):
                file.seek(entry.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                places[f"model.layers.{number}.weight"] = entry.header_offset + 30 + name + extra
    return places
