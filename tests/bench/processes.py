"""Programs that are started for a measurement: the command, the peers' program, Python scripts, `cp`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]

# What a script does that has torch and safetensors: the tensors are mapped, and written from there.
CONVERT = (
    "import sys,torch;from safetensors.torch import save_file;save_file(torch.load(sys.argv[1],mmap=True),sys.argv[2])"
)
# The same question as to reweft: from a path to all tensors. The imports are not counted.
OPEN_TORCH = (
    "import sys,time,torch;t=time.perf_counter();torch.load(sys.argv[1],mmap=True);print(time.perf_counter()-t)"
)
OPEN_REWEFT = "import sys,time,reweft;t=time.perf_counter();reweft.open(sys.argv[1]);print(time.perf_counter()-t)"


def command() -> str:
    """The binary that `make build` made, or the console script."""
    built = ROOT / "target" / "release" / "reweft"
    return str(built if built.exists() else Path(sys.executable).with_name("reweft"))


def run(*arguments: object) -> str:
    """Start a program and wait for it; give what it prints.

    Raises:
        RuntimeError: It failed; the message is what it said.
    """
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def script(text: str, *arguments: object) -> str:
    """Run a Python script in a process of its own."""
    return run(sys.executable, "-c", text, *arguments)


@cache
def peers() -> str | None:
    """Build the program with the crates that reweft is compared with; None, and why on stderr, if that fails."""
    target = ROOT / "target" / "peers"
    manifest = Path(__file__).with_name("peers") / "Cargo.toml"
    build = ["cargo", "build", "--quiet", "--release", "--locked"]
    build += ["--manifest-path", str(manifest), "--target-dir", str(target)]
    try:
        subprocess.run(build, check=True, capture_output=True, text=True)
    except OSError as error:
        sys.stderr.write(f"cargo: {error}\n")
        return None
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
        return None
    return str(target / "release" / "reweft-bench-peers")


def peer_seconds(*arguments: object) -> dict[str, float]:
    """Medians of what the peers' program measured."""
    program = peers()
    assert program
    return {name: statistics.median(seconds) for name, seconds in json.loads(run(program, *arguments)).items()}


def anonymous_megabytes(arguments: Sequence[object]) -> float:
    """The most memory that a process holds and that is no page of a file; sampled while it runs."""
    most = 0
    with subprocess.Popen([str(argument) for argument in arguments], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, _anonymous_kilobytes(process.pid))
            time.sleep(0.0005)
        assert process.returncode == 0, arguments
    return most * 1024 / 1e6


def _anonymous_kilobytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) if found else 0


def sync(path: Path) -> None:
    """What makes a copied file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
