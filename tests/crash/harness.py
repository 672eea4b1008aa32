"""One rewrite in a folder of its own, under strace, and what must be true of the folder afterwards."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from .subjects import Mode

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

# How often the command was killed, failed or cut off, by what was done to it.
RUNS: Counter[str] = Counter()
WORKERS = 2
TIMEOUT = 60

READS = {"read", "pread64", "preadv", "lseek", "statx", "newfstatat", "fstat", "readlink", "access"}
SYNCS = {"fsync", "fdatasync", "sync_file_range", "syncfs", "sync"}
RENAMES = {"rename", "renameat", "renameat2", "link", "linkat"}
WRITES = {"write", "pwrite64", "pwritev", "copy_file_range", "ftruncate", "fallocate"}
# What can change a folder, or what is found in it after a power cut.
CHANGES = WRITES | SYNCS | RENAMES | {"openat", "unlink", "unlinkat", "fchmod", "fchown", "fsetxattr"}
OTHERS = {"ioctl", "flock", "fcntl", "close", "mmap", "munmap", "msync", "sendfile"}
TRACED = CHANGES | READS | OTHERS


class Call(NamedTuple):
    """A system call: the how-manieth of its name in its thread, and the line that strace prints for it."""

    name: str
    number: int
    line: str

    def inject(self, what: str) -> tuple[str, ...]:
        """Options of strace that do something at this call."""
        return ("-e", f"inject={self.name}:{what}:when={self.number}")


class Done(NamedTuple):
    """How the command ended, and the calls that it made since it first named a file of its folder."""

    code: int
    stderr: str
    calls: list[Call]
    # Whether what was to happen at a call did; a thread may make fewer calls than one did before.
    injected: bool

    @property
    def killed(self) -> bool:
        """strace ends itself by the signal that ended the command."""
        return self.code in {-9, 137}


@dataclass(frozen=True)
class Files:
    """Contents for one kind of artifact."""

    command: Path
    suffix: str
    checkpoint: bytes
    other_checkpoint: bytes
    old: bytes
    # What the checkpoints make of the old bytes.
    new: bytes
    other: bytes


@dataclass(frozen=True)
class Subject:
    """Files of one kind and a mode of rewriting them."""

    files: Files
    mode: Mode

    def trial(self, folder: Path) -> Trial:
        """Fresh copies in a folder."""
        folder.mkdir(parents=True)
        trial = Trial(self, folder)
        trial.target.write_bytes(trial.before)
        trial.artifact.write_bytes(self.files.old)
        trial.checkpoint.write_bytes(self.files.checkpoint)
        return trial


@dataclass(frozen=True)
class Trial:
    """A folder in which one rewrite takes place."""

    subject: Subject
    folder: Path

    @property
    def artifact(self) -> Path:
        return self.folder / f"artifact{self.subject.files.suffix}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def target(self) -> Path:
        """The file that is rewritten."""
        return self.folder / f"{self.subject.mode.rewrites}{self.subject.files.suffix}"

    @property
    def journal(self) -> Path:
        return self.folder / f".{self.artifact.name}.reweft-journal"

    @property
    def before(self) -> bytes:
        """What the target holds before the rewrite."""
        return self.subject.files.old if self.target == self.artifact else self.subject.files.other

    @property
    def other_checkpoint(self) -> Path:
        """Not there unless a test writes it."""
        return self.folder / "other.pt"

    def refit_line(
        self, *, artifact: Path | None = None, checkpoint: Path | None = None, out: Path | None = None
    ) -> list[str]:
        """The command that rewrites; files are those of the trial unless said otherwise."""
        artifact, out = artifact or self.artifact, out or self.target
        options = [option.format(artifact=artifact, out=out) for option in self.subject.mode.options]
        checkpoint = checkpoint or self.checkpoint
        return [str(self.subject.files.command), "refit", str(artifact), str(checkpoint), *options]

    def inspect_line(self, path: Path | None = None) -> list[str]:
        return [str(self.subject.files.command), "inspect", str(path or self.artifact)]

    def traced(self, line: Sequence[str], *options: str, log: Path | None = None) -> Done:
        """Run a command under strace with options of it; the log is beside the folder unless said otherwise."""
        log = log or self.folder.with_suffix(".strace")
        strace = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", f"trace={','.join(sorted(TRACED))}"]
        code, stderr = run([*strace, *options, *line])
        text = log.read_text(errors="replace")
        return Done(code, stderr, list(_calls(text, self.folder)), "INJECTED" in text)

    def found(self) -> str:
        """Whether the target holds the old bytes or the new ones; anything else is what must not happen."""
        held = self.target.read_bytes()
        if self.target != self.artifact:
            assert self.artifact.read_bytes() == self.subject.files.old, "the artifact is only read"
        assert self.checkpoint.read_bytes() == self.subject.files.checkpoint, "the checkpoint is only read"
        if held == self.subject.files.new:
            return "new"
        assert held == self.before, self.difference(held)
        return "old"

    def difference(self, held: bytes) -> str:
        """Says how bytes that are neither old nor new differ from both."""
        lengths = f"{len(held)} bytes, old {len(self.before)}, new {len(self.subject.files.new)}"
        counts = [
            sum(one != other for one, other in zip(held, known, strict=False))
            for known in (self.before, self.subject.files.new)
        ]
        return f"{self.target}: {lengths}; {counts[0]} bytes are not old and {counts[1]} are not new"

    def recovered(self) -> str:
        """Open the files as any later command does; gives what the target holds then."""
        for path in {self.artifact, self.target}:
            code, stderr = run(self.inspect_line(path))
            assert code == 0, f"inspect {path}: {stderr}"
        assert not self.journal.exists(), "a later command leaves no journal"
        assert self.strays() <= self.temporary(), "nothing is left but temporary files by their name"
        return self.found()

    def strays(self) -> set[str]:
        """Names in the folder that were not there before the rewrite."""
        known = {self.artifact, self.checkpoint, self.other_checkpoint, self.target, self.journal}
        return {path.name for path in self.folder.iterdir()} - {path.name for path in known}

    def temporary(self) -> set[str]:
        """Names of temporary files that a command left behind."""
        return {name for name in self.strays() if name.startswith(".reweft-")}

    def again(self) -> None:
        """The same rewrite once more, which nothing that was left behind must hinder."""
        code, stderr = run(self.refit_line())
        assert code == 0, stderr
        assert self.recovered() == "new"


def run(line: Sequence[str], *, restore_signals: bool = True, stdout: bool = False) -> tuple[int, str]:
    """Exit code and stderr (or stdout) of a command; its working folder is none of those that matter."""
    done = subprocess.run(
        line,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=TIMEOUT,
        restore_signals=restore_signals,
    )
    return done.returncode, (done.stdout if stdout else done.stderr).decode(errors="replace")


def _calls(log: str, folder: Path) -> Iterator[Call]:
    """Calls of a log from the first on that names the folder."""
    counts: Counter[tuple[str | Any, ...]] = Counter()
    reached = False
    for line in log.splitlines():
        found = re.match(r"(\d+) +(\w+)\(", line)
        if found is None:
            continue
        counts[found.groups()] += 1
        reached = reached or f"{folder}/" in line
        if reached:
            yield Call(found[2], counts[found[1], found[2]], line)


def thinned(calls: Iterable[Call], names: set[str], every: int) -> list[Call]:
    """All calls but those of these names, of which it takes every n-th."""
    return [call for call in unique(calls) if call.name not in names or call.number % every == 0]


def unique(calls: Iterable[Call]) -> list[Call]:
    """Threads count for themselves, so two of them may have a call of one number: it is one place to inject at."""
    return list({(call.name, call.number): call for call in calls}.values())


def each(what: str, items: Iterable[ItemT], do: Callable[[int, ItemT], ResultT]) -> list[ResultT]:
    """Do something for every item with its number, two at a time, and count it.

    Raises:
        BaseExceptionGroup: What went wrong for any of them.
    """
    listed = list(items)
    RUNS[what] += len(listed)
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(do, number, item) for number, item in enumerate(listed)]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        raise BaseExceptionGroup(f"{len(errors)} of {len(listed)} {what}", errors)
    return [job.result() for job in jobs]


@cache
def no_strace() -> str | None:
    """Why system calls cannot be met here."""
    try:
        code, stderr = run(["strace", "-o", "/dev/null", "true"])
    except FileNotFoundError:
        return "strace is not installed"
    return None if code == 0 else f"strace does not work here: {stderr}"


needs_strace = pytest.mark.skipif(no_strace() is not None, reason=no_strace() or "")
