"""Journals of rewrites in place: finished whatever happens, and applied to nothing but the file that they are of."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from .harness import READS, WRITES, Call, Done, Subject, Trial, each, needs_strace, run, thinned, unique
from .subjects import MODES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_strace

SECTORS = [4096, 512, 64, 1]


def writes_of(subject: Subject, folder: Path) -> list[Call]:
    """The calls by which an undisturbed rewrite writes into the artifact."""
    trial = subject.trial(folder)
    done = trial.traced(trial.refit_line())
    assert done.code == 0, done.stderr
    return [call for call in unique(done.calls) if call.name in WRITES and f"<{trial.artifact}>" in call.line]


def interrupted(trial: Trial, call: Call) -> Trial:
    """The rewrite is killed at a write into the artifact, so that there is a journal."""
    assert trial.traced(trial.refit_line(), *call.inject("signal=SIGKILL")).killed
    assert trial.journal.exists()
    return trial


@pytest.fixture
def start(in_place: Subject, tmp_path: Path) -> Callable[[object], Trial]:
    """Makes folders in which a rewrite had written half of what it writes when it was killed."""
    writes = writes_of(in_place, tmp_path / "whole")

    def begun(name: object) -> Trial:
        return interrupted(in_place.trial(tmp_path / str(name)), writes[len(writes) // 2])

    return begun


def mixed(trial: Trial, seed: int, nbytes: int) -> bytes:
    """Old and new in turn, by sectors, as a disk may have written them."""
    draw = random.Random(seed)  # noqa: S311
    sides = (trial.subject.files.old, trial.subject.files.new)
    return b"".join(draw.choice(sides)[at : at + nbytes] for at in range(0, len(sides[0]), nbytes))


def test_any_mix_is_finished(start: Callable[[object], Trial]) -> None:
    def finished(number: int, nbytes: int) -> None:
        trial = start(number)
        trial.artifact.write_bytes(mixed(trial, number, nbytes))
        assert trial.recovered() == "new"
        assert trial.strays() == set()

    each("in place, the file a mix", SECTORS * 3, finished)


def recovery(trial: Trial) -> list[Call]:
    """Calls of an undisturbed recovery; reads are thinned out."""
    done = trial.traced(trial.inspect_line())
    assert (done.code, trial.found()) == (0, "new"), done.stderr
    return thinned(done.calls, READS, 8)


def test_kill_at_every_call_of_the_recovery(start: Callable[[object], Trial]) -> None:
    def killed(number: int, call: Call) -> bool:
        trial = start(number)
        done = trial.traced(trial.inspect_line(), *call.inject("signal=SIGKILL"))
        assert done.killed or done.code == 0, done.stderr
        assert trial.recovered() == "new"
        trial.again()
        return done.killed

    met = each("recovery killed at a system call", recovery(start("whole recovery")), killed)
    assert sum(met) > len(met) * 0.9


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_call_of_the_recovery_that_fails(error: str, start: Callable[[object], Trial]) -> None:
    def failed(number: int, call: Call) -> None:
        trial = start(number)
        done = trial.traced(trial.inspect_line(), *call.inject(f"error={error}"))
        assert_reported(trial, done, call)
        assert trial.recovered() == "new"
        assert trial.strays() == set()

    calls = recovery(start("whole recovery"))
    about = [call for call in calls if "reweft-journal" in call.line or call.name in WRITES | {"fdatasync", "fsync"}]
    each(f"recovery failed with {error}", [call for call in about if call.name != "close"], failed)


def assert_reported(trial: Trial, done: Done, call: Call) -> None:
    """A recovery that could not finish is an error, not a look at half a file."""
    if "(2<" in call.line or "(1<" in call.line:
        return
    assert done.code in {0, 2}, call.line
    assert done.code == 0 or str(trial.folder) in done.stderr, done.stderr
    if trial.journal.exists():
        assert done.code == 2, call.line


def assert_not_applied(trial: Trial, before: bytes) -> None:
    """The artifact keeps its bytes: the journal is removed as never committed, or refused by its name."""
    code, stderr = run(trial.inspect_line())
    assert trial.artifact.read_bytes() == before
    if code == 0:
        assert not trial.journal.exists()
    else:
        assert code == 2
        assert str(trial.journal) in stderr
        trial.journal.unlink()
        assert run(trial.inspect_line())[0] == 0


def test_journal_of_another_file(start: Callable[[object], Trial]) -> None:
    """Somebody put another file at this name after the crash."""

    def replaced(number: int, content: bytes) -> None:
        trial = start(number)
        fresh = trial.folder / "fresh"
        fresh.write_bytes(content)
        fresh.replace(trial.artifact)
        assert_not_applied(trial, content)

    files = start("any").subject.files
    each("in place, the journal of another file", [files.old, files.other, files.new], replaced)


def test_damaged_journal(in_place: Subject, tmp_path: Path) -> None:
    """Cut short or with one bit changed, beside a file that nothing was written to yet."""
    first = writes_of(in_place, tmp_path / "whole")[0]
    nbytes = interrupted(in_place.trial(tmp_path / "first"), first).journal.stat().st_size
    places = [0, 1, 15, 16, 17, 31, 32, 47, 48, nbytes // 3, nbytes // 2, nbytes - 65, nbytes - 33, nbytes - 1]

    def damaged(number: int, change: tuple[str, int]) -> None:
        trial = interrupted(in_place.trial(tmp_path / str(number)), first)
        how, place = change
        data = bytearray(trial.journal.read_bytes())
        if how == "cut":
            del data[place:]
        elif how == "longer":
            data += bytes(1 + place)
        else:
            data[place] ^= 1
        trial.journal.write_bytes(data)
        assert_not_applied(trial, in_place.files.old)

    changes = [(how, place) for how in ("cut", "flip") for place in places]
    each("in place, a damaged journal", [*changes, ("longer", 0), ("longer", 4096)], damaged)


def test_journal_of_a_file_that_a_copy_replaces(start: Callable[[object], Trial]) -> None:
    """A rewrite that replaces the file by a rename has said that it is done, so the file is good from then on."""
    trial = start("x")
    source = trial.folder / f"source{trial.subject.files.suffix}"
    source.write_bytes(trial.subject.files.old)
    copying = Trial(Subject(trial.subject.files, MODES["to another file"]), trial.folder)
    code, stderr = run(copying.refit_line(artifact=source, out=trial.artifact))
    assert code == 0, stderr
    code, stderr = run(trial.inspect_line())
    assert code == 0, stderr
    assert trial.found() == "new"


def test_file_of_two_names_is_whole_by_both(in_place: Subject, tmp_path: Path) -> None:
    """Refused, or finished by whichever name it is opened next."""
    writes = writes_of(in_place, tmp_path / "whole")
    trial = in_place.trial(tmp_path / "x")
    second = trial.folder / f"second{in_place.files.suffix}"
    os.link(trial.artifact, second)
    done = trial.traced(trial.refit_line(), *writes[-1].inject("signal=SIGKILL"))
    assert done.killed or done.code == 2, done.stderr
    code, stderr = run(trial.inspect_line(second))
    assert code == 0, stderr
    trial.found()


def test_names_that_are_no_text_have_journals_of_their_own(in_place: Subject, tmp_path: Path) -> None:
    """Two names that differ in a byte that is no UTF-8, the rewrite of one of them interrupted."""
    last = writes_of(in_place, tmp_path / "whole")[-1]
    trial = in_place.trial(tmp_path / "x")
    names = [trial.folder / f"{os.fsdecode(end)}{in_place.files.suffix}" for end in (b"\xfe", b"\xff")]
    for name in names:
        name.write_bytes(in_place.files.old)
    lines = [trial.refit_line(artifact=name) for name in names]
    assert trial.traced(lines[0], *last.inject("signal=SIGKILL")).killed
    code, stderr = run(lines[1])
    assert code == 0, stderr
    for name in names:
        code, stderr = run(trial.inspect_line(name))
        assert code == 0, stderr
        assert name.read_bytes() == in_place.files.new


@pytest.mark.parametrize("opened_as", ["link", "file"])
def test_rewrite_through_a_link_is_finished_by_either_name(opened_as: str, in_place: Subject, tmp_path: Path) -> None:
    """The journal lies beside the file, as caches of models have links in one folder and files in another."""
    writes = writes_of(in_place, tmp_path / "whole")

    def finished(number: int, call: Call) -> None:
        trial = in_place.trial(tmp_path / f"{number}" / "blobs")
        link = tmp_path / f"{number}" / f"link{in_place.files.suffix}"
        link.symlink_to(trial.artifact.relative_to(link.parent))
        assert trial.traced(trial.refit_line(artifact=link), *call.inject("signal=SIGKILL")).killed
        assert trial.journal.exists()
        code, stderr = run(trial.inspect_line(link if opened_as == "link" else None))
        assert code == 0, stderr
        assert (trial.found(), trial.journal.exists(), trial.strays()) == ("new", False, set())
        assert link.is_symlink()
        assert {path.name for path in link.parent.iterdir()} == {link.name, "blobs", "blobs.strace"}

    each("in place, through a link", [writes[0], writes[-1]], finished)


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_journal_is_for_those_who_may_read_the_file(mode: int, in_place: Subject, tmp_path: Path) -> None:
    first = writes_of(in_place, tmp_path / "whole")[0]
    trial = in_place.trial(tmp_path / "x")
    trial.artifact.chmod(mode)
    if os.geteuid() == 0:
        os.chown(trial.artifact, 12345, 54321)
    found, wanted = interrupted(trial, first).journal.stat(), trial.artifact.stat()
    assert (found.st_mode, found.st_uid, found.st_gid) == (wanted.st_mode, wanted.st_uid, wanted.st_gid)
