"""Calls that fail: no space, broken disks, interrupts, limits."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import pytest

from .harness import CHANGES, SYNCS, Call, Done, Subject, Trial, each, needs_strace, run, unique
from .power import no_mounts, tmpfs

if TYPE_CHECKING:
    from pathlib import Path

ERRORS = ["ENOSPC", "EIO"]
FALLIBLE = CHANGES | {"ioctl", "flock"}
# Calls that a signal may interrupt.
INTERRUPTED = {"write", "pwrite64", "pwritev", "copy_file_range", "fsync", "fdatasync", "openat", "ftruncate", "flock"}


def failed(trial: Trial, call: Call, error: str) -> None:
    """One call fails: the command says so and names a file, or does without the call."""
    done = trial.traced(trial.refit_line(), *call.inject(f"error={error}"))
    assert_ended(trial, done.code, done.stderr, call.line)
    if error != "EINTR":
        assert_synced_once(done)


def assert_ended(trial: Trial, code: int, stderr: str, what: str = "") -> None:
    """What is true after success and after an error that the command could report."""
    assert code in {0, 2}, f"{what}: {stderr}"
    assert trial.strays() == set(), what
    if not trial.journal.exists():
        trial.found()
    held = trial.recovered()
    assert code == 2 or held == "new", what
    trial.again()


def assert_synced_once(done: Done) -> None:
    """What failed to sync is not synced again: the kernel may have dropped the pages and would say yes."""
    broken: set[str] = set()
    for call in done.calls:
        if call.name in SYNCS:
            path = re.search(r"<([^>]*)>", call.line)
            assert path, call.line
            assert path[1] not in broken, call.line
            if "INJECTED" in call.line:
                broken.add(path[1])


def calls(subject: Subject, folder: Path, names: set[str]) -> list[Call]:
    """Calls of an undisturbed rewrite that are about files of its folder."""
    trial = subject.trial(folder)
    done = trial.traced(trial.refit_line())
    assert done.code == 0, done.stderr
    return [call for call in unique(done.calls) if call.name in names and str(folder) in call.line]


@needs_strace
@pytest.mark.parametrize("error", [*ERRORS, "EINTR"])
def test_call_that_fails(error: str, subject: Subject, tmp_path: Path) -> None:
    points = calls(subject, tmp_path / "first", INTERRUPTED if error == "EINTR" else FALLIBLE)
    each(
        f"failed with {error}",
        points,
        lambda number, call: failed(subject.trial(tmp_path / str(number)), call, error),
    )


@needs_strace
def test_message_names_the_file(subject: Subject, tmp_path: Path) -> None:
    def named(number: int, call: Call) -> None:
        trial = subject.trial(tmp_path / str(number))
        done = trial.traced(trial.refit_line(), *call.inject("error=ENOSPC"))
        # Threads share the work anew each time: the number may be that of the write to standard output.
        printed = any(re.search(r"\bwrite\(1<.*INJECTED", made.line) for made in done.calls)
        names = {str(path) for path in meant(trial, call)} | ({"write to standard output"} if printed else set())
        assert done.code == 0 or any(f"error: {name}: " in done.stderr for name in names), done.stderr

    each("failed with ENOSPC", calls(subject, tmp_path / "first", FALLIBLE), named)


def meant(trial: Trial, call: Call) -> set[Path]:
    """Files that the message about a call may name: those of the call, or whose temporary file or folder it uses."""
    known = {trial.artifact, trial.checkpoint, trial.target}
    named = {path for path in known if f"/{path.name}" in call.line}
    return named | {trial.target} if "/.reweft-" in call.line else named or {trial.target, trial.journal}


def limits(trial: Trial) -> list[int]:
    """Bytes at which a file must end: none, in the middle of everything, all but one."""
    whole = len(trial.before)
    return [0, 1, 4095, 4096, whole // 4, whole // 2, whole - 4096, whole - 1]


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
def test_files_must_not_grow_beyond_a_limit(subject: Subject, tmp_path: Path) -> None:
    """Writes that are short because the kernel makes them so, then EFBIG."""

    def limited(number: int, nbytes: int) -> int:
        trial = subject.trial(tmp_path / str(number))
        line = ["prlimit", f"--fsize={nbytes}:{nbytes}", *trial.refit_line()]
        # Python ignores SIGXFSZ, and a child that does not restore it gets the error.
        code, stderr = run(line, restore_signals=False)
        assert_ended(trial, code, stderr)
        return code

    codes = each("limited in the size of its files", limits(subject.trial(tmp_path / "first")), limited)
    assert 2 in codes


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
def test_ended_by_the_signal_of_the_limit(subject: Subject, tmp_path: Path) -> None:
    def limited(number: int, nbytes: int) -> None:
        trial = subject.trial(tmp_path / str(number))
        code, _ = run(["prlimit", f"--fsize={nbytes}:{nbytes}", "--core=0", *trial.refit_line()])
        assert code in {0, -25}
        held = trial.recovered()
        assert code != 0 or held == "new"
        trial.again()

    each("killed at the limit of its files", limits(subject.trial(tmp_path / "first")), limited)


@pytest.mark.skipif(no_mounts() is not None, reason=no_mounts() or "")
def test_full_disk(subject: Subject, tmp_path: Path) -> None:
    """A tmpfs with fewer pages than the rewrite needs, from none to enough."""
    kept = len(subject.trial(tmp_path / "first").before) // 4096 + 1

    def filled(number: int, spare: int) -> int:
        point = tmp_path / str(number)
        with tmpfs(point, 1 << 20):
            trial = subject.trial(point / "x")
            rest = point / "rest"
            fill(rest, spare)
            code, stderr = run(trial.refit_line())
            rest.unlink()
            assert_ended(trial, code, stderr)
        return code

    codes = each("on a full disk", [0, 1, 2, kept // 3, kept - 3, kept - 1, kept, 3 * kept], filled)
    assert {0, 2} == set(codes)


def fill(path: Path, spare: int) -> None:
    """Fill a small file system with one file, and give back some pages."""
    nbytes = 0
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                nbytes += file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, nbytes - 4096 * spare))


@needs_strace
def test_short_write_is_continued(subject: Subject, tmp_path: Path) -> None:
    """strace answers for the kernel that one byte was written, so only what the command asks next has a meaning."""

    def shortened(number: int, call: Call) -> None:
        trial = subject.trial(tmp_path / str(number))
        done = trial.traced(trial.refit_line(), *call.inject("retval=1"))
        made = {asked_for(call) for call in done.calls if call.name == "pwrite64"}
        assert not done.injected or any((nbytes - 1, at + 1) in made for nbytes, at in made), made

    each("written short", calls(subject, tmp_path / "first", {"pwrite64"}), shortened)


def asked_for(call: Call) -> tuple[int, int]:
    """Bytes and byte offset of a pwrite64."""
    found = re.search(r", (\d+), (\d+)(?:\)| <unfinished)", call.line)
    assert found, call.line
    return int(found[1]), int(found[2])
