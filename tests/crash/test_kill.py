"""SIGKILL at every system call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .harness import READS, WRITES, Call, Subject, Trial, each, needs_strace, thinned

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_strace

# A read changes nothing, so the state at one is that of the call before it.
EVERY_READ = 12


def killed(trial: Trial, call: Call) -> tuple[bool, str]:
    """Whether the signal met the call, and what the target holds in the end."""
    done = trial.traced(trial.refit_line(), *call.inject("signal=SIGKILL"))
    assert done.killed or done.code == 0, done.stderr
    if not trial.journal.exists():
        trial.found()
    held = trial.recovered()
    assert done.killed or held == "new"
    trial.again()
    return done.killed, held


def test_kill_at_every_call(subject: Subject, tmp_path: Path) -> None:
    first = subject.trial(tmp_path / "first")
    done = first.traced(first.refit_line())
    assert (done.code, first.recovered()) == (0, "new"), done.stderr
    points = thinned(done.calls, READS, EVERY_READ)
    results = each(
        "killed at a system call",
        points,
        lambda number, call: killed(subject.trial(tmp_path / str(number)), call),
    )
    states = [held for met, held in results if met]
    assert len(states) > len(points) * 0.9, "the signals meet the command"
    assert {"old", "new"} == set(states)


def test_what_is_left_is_for_those_who_may_read_the_artifact(subject: Subject, tmp_path: Path) -> None:
    """Temporary files hold weights too."""
    first = subject.trial(tmp_path / "first")
    writes = [call for call in thinned(first.traced(first.refit_line()).calls, READS, 1) if call.name in WRITES]

    def left(number: int, call: Call) -> int:
        trial = subject.trial(tmp_path / str(number))
        trial.artifact.chmod(0o600)
        trial.traced(trial.refit_line(), *call.inject("signal=SIGKILL"))
        found = [trial.folder / name for name in trial.temporary()] + [trial.journal] * trial.journal.exists()
        assert [path.name for path in found if path.stat().st_mode & 0o077] == []
        return len(found)

    assert sum(each("killed, its rest private", writes, left)) > 0
