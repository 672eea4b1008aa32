"""Power cuts: what is on the disk afterwards is the old file or the new one, and new once the command has said so."""

from __future__ import annotations

import itertools
import queue
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .harness import CHANGES, WORKERS, WRITES, Call, Subject, Trial, each, run, unique
from .power import FLUSH_JOURNAL, FLUSH_NOTHING, Disk, missing, write_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Cut = Callable[[Disk, Trial], None]

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

# ext4 by default, and without the rule that saves programs which rename before they sync.
OPTIONS = ["", "noauto_da_alloc"]


def cut_at_once(disk: Disk, _: Trial) -> None:
    """Nothing reaches the disk that was not synced."""
    disk.cut(FLUSH_NOTHING)


def cut_after_journal(disk: Disk, _: Trial) -> None:
    """Names and sizes reach the disk, contents do not."""
    disk.cut(FLUSH_JOURNAL)


def cut_after_first_half(disk: Disk, trial: Trial) -> None:
    """The kernel had begun to write files back from the start."""
    for path in trial.folder.iterdir():
        write_back(path, 0, path.stat().st_size // 2 + 1)
    disk.cut(FLUSH_NOTHING)


def cut_after_second_half(disk: Disk, trial: Trial) -> None:
    """The kernel had begun somewhere else."""
    for path in trial.folder.iterdir():
        write_back(path, path.stat().st_size // 2 & ~4095, 1 << 30)
    disk.cut(FLUSH_NOTHING)


CUTS: list[Cut] = [
    cut_at_once,
    cut_after_journal,
    cut_after_first_half,
    cut_after_second_half,
]


class Disks:
    """One for each worker."""

    def __init__(self, folder: Path) -> None:
        self.free: queue.SimpleQueue[Disk] = queue.SimpleQueue()
        self.made: list[Disk] = []
        for number in range(WORKERS):
            (folder / str(number)).mkdir()
            self.made.append(Disk(folder / str(number)))
            self.free.put(self.made[-1])

    @contextmanager
    def mounted(self, options: str) -> Iterator[Disk]:
        """An empty disk that is mounted; it may be remounted meanwhile."""
        disk = self.free.get()
        disk.options = options
        disk.mount()
        try:
            yield disk
        finally:
            shutil.rmtree(disk.point / "x", ignore_errors=True)
            disk.unmount()
            self.free.put(disk)


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    made = Disks(tmp_path_factory.mktemp("disks"))
    yield made
    for disk in made.made:
        disk.release()


def durable_trial(disk: Disk, subject: Subject) -> Trial:
    """Fresh files that are on the disk."""
    trial = subject.trial(disk.point / "x")
    disk.sync()
    return trial


def restart(disk: Disk) -> None:
    disk.unmount()
    disk.mount()


def changes(subject: Subject, folder: Path) -> list[Call]:
    """Calls of an undisturbed rewrite before which the power may go.

    Killed at a call and cut off is the same to the disk as cut off there: the kernel writes nothing because of it.
    """
    trial = subject.trial(folder)
    done = trial.traced(trial.refit_line())
    assert done.code == 0, done.stderr
    return [call for call in unique(done.calls) if call.name in CHANGES | {"close"} and str(folder) in call.line]


def cuts(points: list[Call], *, every: bool) -> list[tuple[Call, Cut]]:
    """Every way at every call, or the ways in turn."""
    pairs = itertools.product(enumerate(points), enumerate(CUTS))
    return [(call, cut) for (i, call), (k, cut) in pairs if every or i % len(CUTS) == k]


@pytest.mark.parametrize("options", OPTIONS)
def test_cut_at_every_change(options: str, subject: Subject, disks: Disks, tmp_path: Path) -> None:
    def off(number: int, at: tuple[Call, Cut]) -> str:
        call, cut = at
        with disks.mounted(options) as disk:
            trial = durable_trial(disk, subject)
            done = trial.traced(trial.refit_line(), *call.inject("signal=SIGKILL"), log=tmp_path / f"{number}.strace")
            assert done.killed or done.code == 0, done.stderr
            cut(disk, trial)
            restart(disk)
            held = trial.recovered()
            assert done.killed or held == "new", "the command had said that it was done"
            trial.again()
            return held

    every = subject.files.suffix == ".pt2" and options == "noauto_da_alloc"
    held = each("cut off in the middle", cuts(changes(subject, tmp_path / "first"), every=every), off)
    assert held[0] == "old"


@pytest.mark.parametrize("options", OPTIONS)
def test_what_the_command_has_done_stays_done(options: str, subject: Subject, disks: Disks) -> None:
    def off(_: int, cut: Cut) -> None:
        with disks.mounted(options) as disk:
            trial = durable_trial(disk, subject)
            code, stderr = run(trial.refit_line())
            assert code == 0, stderr
            cut(disk, trial)
            restart(disk)
            assert trial.found() == "new"
            assert trial.strays() == set()
            assert trial.recovered() == "new"

    each("cut off right after the end", CUTS, off)


def test_disk_finds_out_who_does_not_sync(subject: Subject, disks: Disks, tmp_path: Path) -> None:
    """What the tests above rest on: syncs that strace answers without the kernel are missed."""
    with disks.mounted("") as disk:
        trial = durable_trial(disk, subject)
        skip = ("-e", "inject=fsync,fdatasync:retval=0")
        done = trial.traced(trial.refit_line(), *skip, log=tmp_path / "log")
        assert (done.code, trial.found()) == (0, "new"), done.stderr
        cut_at_once(disk, trial)
        restart(disk)
        assert trial.found() == "old"


def test_cut_in_the_recovery_and_after_it(in_place: Subject, disks: Disks, tmp_path: Path) -> None:
    """A journal is finished however often the power goes, and once it is gone the file needs it no more."""
    first = in_place.trial(tmp_path / "first")
    writes = [call for call in first.traced(first.refit_line()).calls if f"<{first.artifact}>" in call.line]
    half = [call for call in writes if call.name in WRITES][1]

    def off(number: int, at: tuple[Call, Cut]) -> bool:
        call, cut = at
        log = tmp_path / f"{number}.strace"
        with disks.mounted("noauto_da_alloc") as disk:
            trial = durable_trial(disk, in_place)
            assert trial.traced(trial.refit_line(), *half.inject("signal=SIGKILL"), log=log).killed
            cut(disk, trial)
            restart(disk)
            done = trial.traced(trial.inspect_line(), *call.inject("signal=SIGKILL"), log=log)
            cut(disk, trial)
            restart(disk)
            assert trial.recovered() == "new"
            disk.cut(FLUSH_NOTHING)
            restart(disk)
            assert trial.found() == "new"
            return done.killed

    trial = in_place.trial(tmp_path / "second")
    assert trial.traced(trial.refit_line(), *half.inject("signal=SIGKILL")).killed
    done = trial.traced(trial.inspect_line())
    points = [call for call in unique(done.calls) if call.name in CHANGES and str(trial.folder) in call.line]
    met = each("cut off in the recovery", cuts(points, every=in_place.files.suffix == ".pt2"), off)
    assert any(met)
