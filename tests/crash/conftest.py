"""The command, files of every kind for every mode, and the count of runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from .harness import RUNS, Files, Subject, run
from .subjects import KINDS, MODES, state

if TYPE_CHECKING:
    from collections.abc import Callable

BUILT = Path(__file__).parents[2] / "target/release/reweft"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if RUNS:
        terminalreporter.section("rewrites that were disturbed")
        for what, count in sorted(RUNS.items()):
            terminalreporter.write_line(f"{count:6} {what}")
        terminalreporter.write_line(f"{RUNS.total():6} in all")


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the binary, so that a build meanwhile does not matter; or the console script."""
    if not BUILT.exists():
        return Path(sys.executable).with_name("reweft")
    return Path(shutil.copy(BUILT, tmp_path_factory.mktemp("bin") / "reweft"))


@pytest.fixture(scope="session")
def files(command: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """Files of a kind by its name, made once."""
    made: dict[str, Files] = {}

    def of(name: str) -> Files:
        if name not in made:
            made[name] = _made(command, name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


def _made(command: Path, name: str, folder: Path) -> Files:
    kind = KINDS[name]
    old, new, other = (folder / f"{which}{kind.suffix}" for which in ("old", "new", "other"))
    kind.write(state(0), old)
    for out, seed in [(new, 1), (other, 2)]:
        checkpoint = folder / f"{seed}.pt"
        torch.save(state(seed), checkpoint)
        code, stderr = run([str(command), "refit", str(old), str(checkpoint), "-o", str(out)])
        assert code == 0, stderr
        code, stderr = run([str(command), "verify", str(out), str(checkpoint)])
        assert code == 0, stderr
    checkpoints = [(folder / f"{seed}.pt").read_bytes() for seed in (1, 2)]
    return Files(command, kind.suffix, *checkpoints, *(path.read_bytes() for path in (old, new, other)))


@pytest.fixture(params=[pytest.param((kind, mode), id=f"{kind} {mode}") for kind in KINDS for mode in MODES])
def subject(request: pytest.FixtureRequest, files: Callable[[str], Files]) -> Subject:
    """Every kind in every mode."""
    kind, mode = request.param
    return Subject(files(kind), MODES[mode])


@pytest.fixture(params=KINDS)
def in_place(request: pytest.FixtureRequest, files: Callable[[str], Files]) -> Subject:
    """Every kind, in place."""
    return Subject(files(request.param), MODES["in place"])
