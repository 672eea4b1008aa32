"""An encoder like BERT with 100 MB of weights: its calls, its refits, and its calls beside refits."""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as fn

import reweft.torch as rt

from .rows import Row
from .subject import compile_stock, in_turn
from .timing import Job, median_seconds

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .subject import StateDict, Subject

WIDTH, LAYERS, WORDS, LENGTH, BATCH = 512, 7, 5000, 32, 1
SECONDS = 10.0
REFITS_PER_SECOND = 10


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        mixed = fn.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(mixed))
        out: torch.Tensor = self.norm2(x + self.down(fn.gelu(self.up(x))))
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(self.words(tokens))
        return out


def make(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder().eval().requires_grad_(requires_grad=False)


def rows(subject: Subject) -> list[Row]:
    net, tokens = make(0), torch.randint(0, WORDS, (BATCH, LENGTH))
    states = (dict(net.state_dict()), dict(make(1).state_dict()))
    files = (subject.folder / "encoder0.safetensors", subject.folder / "encoder1.safetensors")
    for state, path in zip(states, files, strict=True):
        safetensors.torch.save_file(state, path)
    package = subject.folder / "encoder.pt2"
    rt.save(rt.trace(net, tokens), package)
    start = time.perf_counter()
    compile_stock(net, tokens, subject.folder / "encoder_stock.pt2")
    compiled = time.perf_counter() - start
    found = [
        *_refits(package, states, files, compiled),
        *_calls(subject, package, net, tokens),
        _beside(package, states, tokens),
    ]
    for path in (*files, package):
        path.unlink()
    return found


def _refits(package: Path, states: tuple[StateDict, StateDict], files: tuple[Path, Path], compiled: float) -> list[Row]:
    plain, kept, peer = (
        rt.load(package),
        rt.load(package, standby=True),
        torch._inductor.aoti_load_package(str(package)),
    )
    mapped = in_turn(files)
    copied, lent, fresh, theirs, moved = (in_turn(states) for _ in range(5))
    room = {key: torch.empty_like(value) for key, value in states[0].items()}

    def move(state: StateDict) -> None:
        for key, value in state.items():
            room[key].copy_(value)

    reports: list[rt.ReplaceReport] = []
    jobs = {
        "mapped": Job(lambda: reports.append(rt.replace_weights(plain, next(mapped)))),
        "lent": Job(lambda: reports.append(rt.replace_weights(plain, next(lent), copy=False))),
        "copied": Job(lambda: rt.replace_weights(kept, next(copied))),
        "fresh": Job(lambda: rt.replace_weights(plain, next(fresh))),
        "constants": Job(lambda: peer.load_constants(next(theirs), check_full_update=True)),
        "memcpy": Job(lambda: move(next(moved))),
    }
    median_seconds(jobs, rounds=3)
    found = median_seconds(jobs, rounds=15)
    assert all(report.bytes_copied == 0 for report in reports)
    megabytes = reports[0].nbytes / 1e6
    constants = "load_constants of a state_dict"
    return [
        Row(
            f"refit {megabytes:.0f} MB, safetensors",
            found["mapped"],
            found["constants"],
            f"{constants}; here no byte is copied",
        ),
        Row(
            f"refit {megabytes:.0f} MB, copy=False",
            found["lent"],
            found["constants"],
            f"{constants}; here no byte is copied",
        ),
        Row(f"refit {megabytes:.0f} MB, copy=False", found["lent"], compiled, "compile again"),
        Row(f"refit {megabytes:.0f} MB, state_dict, standby", found["copied"], found["constants"], "load_constants"),
        Row(
            f"refit {megabytes:.0f} MB, state_dict, standby",
            found["copied"],
            found["memcpy"],
            "floor: copy_ of each tensor",
        ),
        Row(f"refit {megabytes:.0f} MB, state_dict", found["fresh"], found["constants"], "load_constants"),
    ]


def _calls(subject: Subject, package: Path, net: nn.Module, tokens: torch.Tensor) -> list[Row]:
    ours, peer = rt.load(package), torch._inductor.aoti_load_package(str(package))
    jitted = torch.compile(net)
    saved = [str(subject.folder / name) for name in ("precompiled.py", "precompiled.cache")]
    with torch.compiler.precompile.capture(
        lambda model, x: model(x), artifact_path=saved[0], cache_path=saved[1]
    ) as capture:
        capture(net, tokens)
    precompiled = torch.compiler.precompile.load(*saved)
    models: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(tokens),
        "aoti_load_package": lambda: peer(tokens),
        "torch.compile": lambda: jitted(tokens),
        "torch.compiler.precompile": lambda: precompiled(net, tokens),
        "eager": lambda: net(tokens),
    }
    with torch.no_grad():
        for call in models.values():
            call()
        found = median_seconds({name: Job(call, repeats=5) for name, call in models.items()}, rounds=15)
    return [Row("one call of the encoder", found["ours"], found[name], name) for name in models if name != "ours"]


def _beside(package: Path, states: tuple[StateDict, StateDict], tokens: torch.Tensor) -> Row:
    """The slowest call but one in a hundred, while another thread refits and while none does, in turn."""
    model, weights, done = rt.load(package, replicas=2), in_turn(states), threading.Event()
    refitting = threading.Event()

    def refit() -> None:
        while not done.wait(1 / REFITS_PER_SECOND):
            if refitting.is_set():
                rt.replace_weights(model, next(weights), copy=False)

    thread = threading.Thread(target=refit)
    thread.start()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(int(SECONDS)):
            for busy in (False, True):
                (refitting.set if busy else refitting.clear)()
                until = time.perf_counter() + 1
                while (start := time.perf_counter()) < until:
                    model(tokens)
                    seconds[busy].append(time.perf_counter() - start)
    finally:
        done.set()
        thread.join()
    p99 = {busy: statistics.quantiles(found, n=100)[98] for busy, found in seconds.items()}
    return Row("99th percentile of calls beside 10 refits/s", p99[True], p99[False], "without refits; bar: 1.2 times")
