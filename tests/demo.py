"""The main job on real data: compile an untrained model, train it, refit the compiled one.

Run by `make demo`. Everything happens in a temporary folder, which is removed again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import reweft
import reweft.torch as rt

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 0
BATCH = 32
EPOCHS = 15
MIN_ACCURACY = 0.95
MAX_DIFFERENCE = 1e-4

STEPS = """\
Compiles an untrained classifier of handwritten digits, trains it, and puts the trained weights into what was
compiled: on disk with the command `reweft refit`, and live with `reweft.torch.replace_weights`.
"""


@dataclass(frozen=True)
class Digits:
    """Images of 8 x 8 pixels with their digits; shapes (n, 1, 8, 8) and (n,)."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Result:
    """One compiled model: how it answers, and what it cost to give it its weights."""

    accuracy: float
    difference: float
    seconds: float
    bytes_copied: int


def split_digits() -> tuple[Digits, Digits]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    numbers = train_test_split(range(len(labels)), test_size=0.25, random_state=SEED, stratify=labels)
    train, test = (torch.tensor(part) for part in numbers)
    classes = torch.tensor(labels)
    return Digits(images[train], classes[train]), Digits(images[test], classes[test])


def make_net() -> torch.nn.Sequential:
    torch.manual_seed(SEED)
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def train(net: torch.nn.Module, digits: Digits) -> dict[str, Any]:
    """Train in place; gives what people put into a checkpoint."""
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    net.train()
    for _ in range(EPOCHS):
        for chosen in torch.split(torch.randperm(len(digits.labels)), BATCH):
            loss = torch.nn.functional.cross_entropy(net(digits.images[chosen]), digits.labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    net.eval()
    return {
        "epoch": EPOCHS,
        # The prefix that DataParallel leaves.
        "model_state_dict": {"module." + key: value for key, value in net.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
    }


def answers(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Scores of shape (n, 10), batch after batch. The program takes full batches: the last one is padded."""
    scores = []
    with torch.no_grad():
        for batch in torch.split(images, BATCH):
            padding = torch.zeros(BATCH - len(batch), *images.shape[1:])
            scores.append(model(torch.cat([batch, padding]))[: len(batch)])
    return torch.cat(scores)


def judge(
    model: Callable[[torch.Tensor], torch.Tensor],
    eager: torch.nn.Module,
    digits: Digits,
    *,
    seconds: float,
    bytes_copied: int,
) -> Result:
    scores = answers(model, digits.images)
    accuracy = (scores.argmax(1) == digits.labels).double().mean().item()
    difference = (scores - answers(eager, digits.images)).abs().max().item()
    return Result(accuracy, difference, seconds, bytes_copied)


def refit_by_command(package: Path, checkpoint: Path, out: Path) -> tuple[float, int]:
    """Run the binary as one would in a shell; gives seconds of the whole process and weight bytes written."""
    built = Path(__file__).parents[1] / "target" / "release" / "reweft"
    binary = built if built.exists() else Path(sys.executable).with_name("reweft")
    command = [str(binary), "refit", str(package), str(checkpoint), "-o", str(out)]
    command += ["--top-level-key", "model_state_dict", "--remap", r"^module\.=", "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    nbytes: int = json.loads(done.stdout)["nbytes"]
    return seconds, nbytes


def run(folder: Path) -> dict[str, Result]:
    """The whole road; gives the models in the order of the table's columns."""
    package, checkpoint, refitted = folder / "net.pt2", folder / "digits.pt", folder / "net-trained.pt2"
    train_digits, test_digits = split_digits()
    net = make_net().eval()

    start = time.perf_counter()
    compiled = rt.trace(net, torch.zeros(BATCH, 1, 8, 8))
    seconds = time.perf_counter() - start
    rt.save(compiled, package)
    results = {"untrained": judge(compiled, net, test_digits, seconds=seconds, bytes_copied=0)}

    torch.save(train(net, train_digits), checkpoint)

    seconds, nbytes = refit_by_command(package, checkpoint, refitted)
    loaded = rt.load(refitted)
    results["refit on disk"] = judge(loaded, net, test_digits, seconds=seconds, bytes_copied=nbytes)

    keys = reweft.KeyMap([(r"^module\.", "")])
    start = time.perf_counter()
    report = rt.replace_weights(compiled, checkpoint, top_level_key="model_state_dict", keys=keys)
    seconds = time.perf_counter() - start
    results["refit live"] = judge(compiled, net, test_digits, seconds=seconds, bytes_copied=report.bytes_copied)
    return results


def table(results: dict[str, Result]) -> str:
    rows = [
        ["", *results],
        ["accuracy", *(f"{result.accuracy:.1%}" for result in results.values())],
        ["largest difference from eager", *(f"{result.difference:.1e}" for result in results.values())],
    ]
    first, *others = results.values()
    times = [f"{result.seconds * 1000:.1f} ms" for result in others]
    rows.append(["time to compile or refit", f"{first.seconds:.1f} s", *times])
    rows.append(["weight bytes copied", "-", *(f"{result.bytes_copied:,}" for result in others)])
    return "\n".join(f"{name:<31}" + "".join(f"{cell:>16}" for cell in cells) for name, *cells in rows)


def failures(results: dict[str, Result]) -> list[str]:
    found = []
    for name, result in results.items():
        if result.difference > MAX_DIFFERENCE:
            found.append(f"{name}: {result.difference:.1e} from eager, allowed is {MAX_DIFFERENCE:.0e}")
        if name != "untrained" and result.accuracy < MIN_ACCURACY:
            found.append(f"{name}: accuracy is {result.accuracy:.1%}, wanted {MIN_ACCURACY:.0%}")
    return found


def main() -> int:
    # What torch says about itself while it compiles is not about this demo.
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("torch").setLevel(logging.ERROR)
    sys.stdout.write(f"{STEPS}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="reweft-demo-") as name:
        # An empty cache, so that the time to compile is what a new model costs.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(name) / "inductor")
        results = run(Path(name))
    sys.stdout.write(f"{table(results)}\n")
    found = failures(results)
    for line in found:
        sys.stderr.write(f"demo failed: {line}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
