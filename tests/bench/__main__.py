"""Runs every topic and prints one table."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import (
    calling,
    compiling,
    converting,
    encoder,
    files,
    following,
    freezing,
    huge,
    loading,
    modules,
    opening,
    overhead,
    processes,
    refitting,
    replacing,
)
from .machine import Others, facts
from .rows import table
from .subject import BATCH, LAYERS, WIDTH, compile_stock, make_net, prepare

if TYPE_CHECKING:
    from types import ModuleType

MODEL_TOPICS = (compiling, replacing, calling, overhead, encoder, following, freezing)
FILE_TOPICS = (opening, converting, refitting, loading, modules, huge)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def chosen(topics: tuple[ModuleType, ...]) -> list[ModuleType]:
    """Those that were named on the command line; all if none was."""
    names = sys.argv[1:]
    return [topic for topic in topics if not names or topic.__name__.rpartition(".")[2] in names]


def main() -> int:
    # What torch says about itself while it compiles is not about these numbers.
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="reweft-bench-") as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        say(facts(folder))
        others = Others()
        # The first compilation of a process also imports the compiler and precompiles torch's headers.
        compile_stock(make_net(0, layers=1, width=16), torch.randn(2, 16), folder / "first.pt2")
        subject = prepare(folder)
        megabytes = subject.nbytes / 1e6
        say(f"MLP of {LAYERS} layers {WIDTH} x {WIDTH}, batch {BATCH}, float32, {megabytes:.1f} MB of weights")
        say("torch computes with 1 thread; medians of interleaved runs; page cache warm")
        say("ratio above 1: reweft does better\n")
        say(table([row for topic in chosen(MODEL_TOPICS) for row in topic.rows(subject)]))
        say("\ncheckpoints: 20,000 tensors of 128 bytes, and 200 of 5.2 MB; page cache warm\n")
        checkpoints = files.prepare(folder)
        say(table([row for topic in chosen(FILE_TOPICS) for row in topic.rows(checkpoints)]))
        if not processes.peers():
            say("\nleft out: rows of other crates, which could not be fetched or built (tests/bench/peers)")
        say(f"\nother programs used {others.cores():.2f} cores meanwhile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
