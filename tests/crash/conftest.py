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

    from .subjects import Mode

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
        if code == 2 and name != "package" and "package" in stderr:
            pytest.skip(f"refit does not take {kind.suffix} as an artifact yet")
        assert code == 0, stderr
        code, stderr = run([str(command), "verify", str(out), str(checkpoint)])
        assert code == 0, stderr
    checkpoints = [(folder / f"{seed}.pt").read_bytes() for seed in (1, 2)]
    return Files(command, kind.suffix, *checkpoints, *(path.read_bytes() for path in (old, new, other)))


@pytest.fixture(scope="session")
def modes(command: Path) -> dict[str, Mode]:
    """Modes that this command has."""
    code, text = run([str(command), "refit", "--help"], stdout=True)
    assert code == 0
    return {name: mode for name, mode in MODES.items() if mode.options[0] in text}


@pytest.fixture(params=[pytest.param((kind, mode), id=f"{kind} {mode}") for kind in KINDS for mode in MODES])
def subject(request: pytest.FixtureRequest, files: Callable[[str], Files], modes: dict[str, Mode]) -> Subject:
    """Every kind in every mode."""
    kind, mode = request.param
    if mode not in modes:
        pytest.skip(f"refit has no mode {mode!r} yet")
    return Subject(files(kind), modes[mode])


@pytest.fixture(params=KINDS)
def in_place(request: pytest.FixtureRequest, files: Callable[[str], Files], modes: dict[str, Mode]) -> Subject:
    """Every kind, in place."""
    if "in place" not in modes:
        pytest.skip("refit has no mode 'in place' yet")
    return Subject(files(request.param), modes["in place"])
