"""Several processes at one file: writers, readers, and programs that serve from it."""

from __future__ import annotations

import fcntl
import mmap
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .harness import READS, Call, Subject, Trial, each, needs_strace, run, thinned
from .subjects import MODES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Microseconds that one writer waits at a call, in which the other one can do everything.
WAIT = 120_000


def race(trial: Trial, second: Trial, *options: str) -> None:
    """Two rewrites from two checkpoints, the first one slowed down by options of strace."""
    trial.other_checkpoint.write_bytes(trial.subject.files.other_checkpoint)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(trial.traced, trial.refit_line(), *options)
        late, late_text = run(second.refit_line(checkpoint=trial.other_checkpoint))
        done = job.result()
    ends = {trial.subject.files.new: (done.code, done.stderr), trial.subject.files.other: (late, late_text)}
    assert all(code in {0, 2} for code, _ in ends.values()), ends.values()
    assert any(code == 0 for code, _ in ends.values()), ends.values()
    assert all(code == 0 or str(trial.target) in text for code, text in ends.values()), ends.values()
    code, text = run(trial.inspect_line(trial.target))
    assert code == 0, text
    held = trial.target.read_bytes()
    assert held in ends, trial.difference(held)
    assert ends[held][0] == 0, "it holds what a writer gave it that said it was done"
    assert trial.strays() == set()
    assert not trial.journal.exists()


@needs_strace
@pytest.mark.parametrize("other", ["onto itself", "in place"])
def test_two_writers(other: str, subject: Subject, tmp_path: Path) -> None:
    """At every stage of one rewrite another one of the same file takes place."""
    if subject.mode.rewrites != "artifact":
        other = "to another file"
    first = subject.trial(tmp_path / "first")
    points = stages(first.traced(first.refit_line()).calls)

    def both(number: int, call: Call) -> None:
        trial = subject.trial(tmp_path / str(number))
        second = Trial(Subject(subject.files, MODES[other]), trial.folder)
        race(trial, second, *call.inject(f"delay_enter={WAIT}"))

    each("two writers", points, both)


def stages(calls: list[Call]) -> list[Call]:
    """Calls at which another writer comes in: the first of a name for a file, and some in between."""
    kept = [call for call in thinned(calls, READS, 10) if call.name not in {"close", "munmap"}]
    return kept[:: max(1, len(kept) // 8)]


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    with path.open("rb") as file:
        fcntl.flock(file, how)
        yield


@pytest.mark.parametrize("how", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["shared", "exclusive"])
def test_locked_file_is_rewritten_by_a_copy_alone(how: int, subject: Subject, tmp_path: Path) -> None:
    trial = subject.trial(tmp_path / "x")
    with locked(trial.artifact, how):
        code, stderr = run(trial.refit_line())
        if subject.mode.options != ("--in-place",):
            assert (code, trial.found()) == (0, "new"), stderr
            return
        assert (code, trial.found()) == (2, "old"), stderr
        assert str(trial.artifact) in stderr
        assert "hint:" in stderr
        assert "-o" in stderr[stderr.index("hint:") :]
    trial.again()


def test_readers_see_old_or_new(subject: Subject, tmp_path: Path) -> None:
    """Who reads the file while copies replace it, by its name or from a mapping of before."""
    if subject.mode.options == ("--in-place",):
        pytest.skip("who reads a file that is rewritten in place has to lock it")
    trial = subject.trial(tmp_path / "x")
    trial.other_checkpoint.write_bytes(subject.files.other_checkpoint)
    files, before = subject.files, trial.before
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            held = trial.target.read_bytes()
            if held not in {before, files.new, files.other}:
                wrong.append(trial.difference(held))

    reader = threading.Thread(target=read)
    with trial.target.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        reader.start()
        for number in range(20):
            code, stderr = run(trial.refit_line(checkpoint=trial.other_checkpoint if number % 2 else None))
            assert code == 0, stderr
        stop.set()
        reader.join()
        assert mapped[:] == before
    assert wrong == []


@needs_strace
def test_commands_read_old_or_new_while_a_file_is_rewritten_in_place(in_place: Subject, tmp_path: Path) -> None:
    """A conversion meanwhile gives the old tensors or the new ones, or says that the file changed."""
    files = in_place.files
    if files.suffix == ".pt2":
        pytest.skip("a package is not converted")
    known = set()
    for number, content in enumerate([files.old, files.new]):
        path = tmp_path / f"{number}{files.suffix}"
        path.write_bytes(content)
        known.add(converted(files.command, path, tmp_path / "x.safetensors")[2])

    def meanwhile(number: int, wait: int) -> tuple[int, int]:
        trial = in_place.trial(tmp_path / f"run{number}")
        slow = ("-e", f"inject=pwrite64,fdatasync,renameat,rename,unlink:delay_enter={wait}")
        line = ["strace", "-f", "-qq", "-o", "/dev/null", *slow, *trial.refit_line()]
        codes = []
        with subprocess.Popen(line, stderr=subprocess.PIPE, cwd="/") as writer:
            while writer.poll() is None:
                code, stderr, held = converted(files.command, trial.artifact, tmp_path / f"out{number}.safetensors")
                assert code in {0, 2}, stderr
                assert code == 2 or held in known, "a mix"
                assert code == 0 or str(trial.artifact) in stderr, stderr
                codes.append(code)
        # A reader that came first can be what the journal waits for.
        assert trial.recovered() == "new" if writer.returncode == 0 else trial.recovered() in {"old", "new"}
        return codes.count(0), codes.count(2)

    each("read while rewritten in place", [1000, 3000, 10000, 30000] * 2, meanwhile)


def converted(command: Path, path: Path, out: Path) -> tuple[int, str, bytes]:
    """Exit code, stderr and what a conversion wrote."""
    out.unlink(missing_ok=True)
    code, stderr = run([str(command), "convert", str(path), str(out)])
    return code, stderr, out.read_bytes() if code == 0 else b""
