"""From a path to all keys, dtypes and shapes, and from there to all bytes."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from . import processes
from .files import SMALL_TENSORS
from .rows import Row

if TYPE_CHECKING:
    from .files import Files

ROUNDS = 5
# The program's rounds are cheap.
OPEN_ROUNDS = 15
READ_ROUNDS = 5


def rows(files: Files) -> list[Row]:
    return [*_python(files), *(_crates(files) if processes.peers() else ())]


def _python(files: Files) -> list[Row]:
    """In fresh processes, in turn."""
    scripts = {"reweft": processes.OPEN_REWEFT, "torch": processes.OPEN_TORCH}
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    for _ in range(ROUNDS):
        for name, text in scripts.items():
            seconds[name].append(float(processes.script(text, files.small)))
    ours, theirs = (statistics.median(seconds[name]) for name in ("reweft", "torch"))
    what = f"open {SMALL_TENSORS:,} tensors, Python"
    return [Row(what, ours, theirs, "torch.load(mmap=True), fresh process, import not counted")]


def _crates(files: Files) -> list[Row]:
    found = processes.peer_seconds("open", files.small, files.small_safetensors, OPEN_ROUNDS)
    what = f"open {SMALL_TENSORS:,} tensors, Rust"
    opened = [
        Row(what, found["reweft"], found["pytorch-reader"], "pytorch-reader 0.22.1"),
        Row(what, found["reweft"], found["candle-core"], "candle-core 0.11.1"),
        Row(what, found["reweft"], found["safetensors"], "floor: safetensors 0.8.0 on the converted file, mapped"),
    ]
    found = processes.peer_seconds("read", files.large, READ_ROUNDS)
    peers = {"pytorch-reader": "pytorch-reader 0.22.1", "pread": "floor: pread of the file into reused buffers"}
    read = [
        Row(f"read 1.05 GB, {threads}", found[f"reweft, {threads}"], found[f"{peer}, {threads}"], peer_is)
        for threads in ("1 thread", "2 threads")
        for peer, peer_is in peers.items()
    ]
    scaling = found["reweft, 1 thread"] / found["reweft, 2 threads"]
    peer_scaling = found["pread, 1 thread"] / found["pread, 2 threads"]
    return [*opened, *read, Row("read, two threads over one", scaling, peer_scaling, "pread", "x")]
