"""A soak: calls and refits beside each other for a while, some of them with weights that do not fit.

`make soak` runs it for longer and shows the figures.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import save

if TYPE_CHECKING:
    from collections.abc import Callable

    State = dict[str, torch.Tensor]

SECONDS = float(os.environ.get("REWEFT_SOAK_SECONDS", "10"))
SERVERS, REFITTERS = 4, 2
# Two good ones and a bad one.
CHECKPOINTS = 3
# Bytes of memory between the warm-up and the end; 2.1 MB of weights are replaced, thousands of times.
GROWTH = 8 << 20


class Served(nn.Module):
    """Large enough for a set of weights that stays behind to show."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(256, 1024)
        self.down = nn.Linear(1024, 256)
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x))) * self.scale
        return out


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packages") / "served.pt2"
    rt.save(rt.trace(models.seeded(Served, 0), torch.zeros(4, 256)), path)
    return path


class Weights:
    """Two sets of weights in every form that they come in, and what is wrong with a third."""

    def __init__(self, folder: Path) -> None:
        self.modules = [models.seeded(Served, seed) for seed in (0, 1)]
        self.states: list[State] = [dict(module.state_dict()) for module in self.modules]
        self.forms: list[list[Any]] = []
        for number, state in enumerate(self.states):
            safe = folder / f"{number}.safetensors"
            save_file(state, safe)
            self.forms.append([state, save(state, folder / f"{number}.pt"), safe])
        self._folder = folder
        self._whole = (folder / "1.pt").read_bytes()

    def bad(self, chance: random.Random, name: str) -> tuple[str, Any, type[reweft.ReweftError]]:
        """Weights with one defect, what it is, and the error that it must be; `name` is for a file."""
        state, path = dict(self.states[1]), self._folder / f"{name}.pt"
        what, key = chance.choice(["shape", "dtype", "missing key", "truncated file"]), chance.choice(list(state))
        if what == "truncated file":
            path.write_bytes(self._whole[: chance.randrange(len(self._whole))])
            return what, path, reweft.FormatError
        if what == "shape":
            state[key] = torch.cat([state[key].reshape(-1), torch.zeros(1)])
        elif what == "dtype":
            state[key] = state[key].double()
        else:
            del state[key]
        return what, save(state, path) if chance.random() < 0.5 else state, reweft.MismatchError


class Soak:
    """What runs beside each other, and what it counts."""

    def __init__(self, model: rt.CompiledModule, weights: Weights, seed: int) -> None:
        self.model, self.weights, self.seed = model, weights, seed
        self.count: Counter[str] = Counter()
        self.failed: list[str] = []
        self.done = threading.Event()
        self._lock = threading.Lock()
        # Each thread has an input of its own, so that an output of another's call is a wrong one too.
        self.inputs = [torch.randn(4, 256) for _ in range(SERVERS)]
        self.wanted: list[list[torch.Tensor]] = []
        self.versions: list[str] = []
        for state, module in zip(weights.states, weights.modules, strict=True):
            rt.replace_weights(model, state)
            self.versions.append(model.weights_version)
            self.wanted.append([model(x) for x in self.inputs])
            with torch.no_grad():
                for x, wanted in zip(self.inputs, self.wanted[-1], strict=True):
                    torch.testing.assert_close(wanted, module(x))

    def serve(self, number: int) -> None:
        """Call until the end; every output is that of one of the two sets of weights, bit for bit."""
        count: Counter[str] = Counter()
        wanted = [outputs[number] for outputs in self.wanted]
        while not self.done.is_set():
            try:
                output = self.model(self.inputs[number])
            except Exception as error:  # noqa: BLE001  (counted)
                self.failed.append(f"call: {error!r}")
                count["failed calls"] += 1
                continue
            matches = [torch.equal(output, one) for one in wanted]
            count["calls"] += 1
            count["wrong outputs"] += matches.count(True) != 1
            count.update(f"outputs of weights {which}" for which, match in enumerate(matches) if match)
        self._add(count)

    def refit(self, number: int) -> None:
        """Refit with one of three checkpoints until the end; the third must be refused."""
        chance, count = random.Random(self.seed + number), Counter[str]()  # noqa: S311
        while not self.done.is_set():
            which = chance.randrange(CHECKPOINTS)
            try:
                if which < len(self.weights.forms):
                    rt.replace_weights(self.model, chance.choice(self.weights.forms[which]))
                    count["refits"] += 1
                else:
                    what, bad, kind = self.weights.bad(chance, f"bad-{number}")
                    with pytest.raises(kind):
                        rt.replace_weights(self.model, bad)
                    count[f"refused: {what}"] += 1
                if chance.random() < 0.05 and self.model.weights_version not in self.versions:
                    count["wrong versions"] += 1
            except BaseException as error:  # noqa: BLE001  (counted; pytest's failures are no exceptions)
                self.failed.append(f"refit: {error!r}")
                count["failed refits"] += 1
        self._add(count)

    def _add(self, count: Counter[str]) -> None:
        with self._lock:
            self.count.update(count)

    def run(self, seconds: float) -> list[int]:
        """Run for a while; gives the memory in use, sampled on the way."""
        jobs: list[tuple[Callable[[int], None], int]] = [(self.serve, number) for number in range(SERVERS)]
        jobs += [(self.refit, number) for number in range(REFITTERS)]
        threads = [threading.Thread(target=job, args=(number,), daemon=True) for job, number in jobs]
        samples, end = [], time.monotonic() + seconds
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            time.sleep(0.05)
            samples.append(resident())
        self.done.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return samples


def resident() -> int:
    """Bytes of this process in memory, those of mapped files too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024


def test_calls_and_refits_beside_each_other(served: Path, tmp_path: Path) -> None:
    model = rt.load(served, replicas=2)
    seed = random.randrange(1 << 32)  # noqa: S311
    soak = Soak(model, Weights(tmp_path), seed)
    samples = soak.run(SECONDS)
    # Memory is what several samples agree on: each may hold weights that a refit has just brought.
    part = len(samples) // 5
    warm, last = (int(statistics.median(some)) for some in (samples[part : 2 * part], samples[-part:]))
    lines = [f"\n{SECONDS:.0f} s, {SERVERS} threads that call, {REFITTERS} that refit, seed {seed}"]
    lines += [f"{number:10,} {what}" for what, number in sorted(soak.count.items())]
    lines.append(f"{warm / 1e6:10.1f} MB in memory after the warm-up, {last / 1e6:.1f} MB at the end")
    print(*lines, sep="\n")  # noqa: T201
    assert soak.failed == []
    assert not soak.count["wrong outputs"]
    assert not soak.count["wrong versions"]
    assert all(soak.count[f"outputs of weights {which}"] for which in (0, 1))
    assert soak.count["refits"] > SECONDS
    assert len([what for what in soak.count if what.startswith("refused: ")]) == 4
    assert last - warm < GROWTH
    for state, wanted in zip(soak.weights.states, soak.wanted, strict=True):
        rt.replace_weights(model, state)
        assert all(torch.equal(model(x), one) for x, one in zip(soak.inputs, wanted, strict=True))
