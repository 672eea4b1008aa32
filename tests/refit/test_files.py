"""The files around a refit: symbolic links, other names of a file, owner, mode, extended attributes."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import reweft
from crash.subjects import KINDS, state
from support import assert_hints, assert_says, leftovers, save

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Cached:
    """An artifact as the Hugging Face cache holds it: names in snapshots are relative links to blobs."""

    folder: Path
    link: Path
    blob: Path
    # Other weights, and what they make of the artifact.
    checkpoint: Path
    refitted: bytes

    @property
    def blobs(self) -> Path:
        return self.blob.parent

    def assert_link_is_there(self) -> None:
        assert self.link.is_symlink()
        assert self.link.resolve() == self.blob
        assert not self.blob.is_symlink()


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact of every kind before and after a refit."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("made")
    before, after = folder / f"before{kind.suffix}", folder / f"after{kind.suffix}"
    kind.write(state(0), before)
    reweft.refit(before, save(state(1), folder / "new.pt"), out=after)
    return before, after


@pytest.fixture
def cached(made: tuple[Path, Path], tmp_path: Path) -> Cached:
    """Every kind of artifact in a cache."""
    before, after = made
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    blob, link = blobs / "5e884898da", snapshot / f"model{before.suffix}"
    blob.write_bytes(before.read_bytes())
    link.symlink_to("../../blobs/5e884898da")
    return Cached(tmp_path, link, blob, save(state(1), tmp_path / "new.pt"), after.read_bytes())


class TestInPlaceThroughALink:
    def test_what_it_points_to_is_rewritten(self, cached: Cached) -> None:
        second = cached.link.with_name("second")
        second.symlink_to(cached.link.name)  # a link to a link
        inode = cached.blob.stat().st_ino
        report = reweft.refit(second, cached.checkpoint, in_place=True)
        assert report.out == second
        assert report.slots_changed == len(state(0)) - 1
        assert cached.blob.read_bytes() == cached.refitted
        assert cached.blob.stat().st_ino == inode
        cached.assert_link_is_there()
        assert second.readlink().name == str(second.readlink()) == cached.link.name
        assert [path.name for path in cached.blobs.iterdir()] == [cached.blob.name]
        assert {path.name for path in cached.link.parent.iterdir()} == {cached.link.name, second.name}

    def test_link_in_the_path(self, cached: Cached) -> None:
        folder = cached.folder / "main"
        folder.symlink_to(cached.link.parent)
        reweft.refit(folder / cached.link.name, cached.checkpoint, in_place=True)
        assert cached.blob.read_bytes() == cached.refitted
        cached.assert_link_is_there()

    def test_checkpoint_that_is_the_artifact_is_refused(self, cached: Cached) -> None:
        before = cached.blob.read_bytes()
        for artifact, checkpoint in [(cached.link, cached.blob), (cached.blob, cached.link)]:
            if cached.link.suffix == ".pt2":
                continue  # a package is no checkpoint
            with pytest.raises(reweft.UsageError) as error:
                reweft.refit(artifact, checkpoint, in_place=True)
            assert_says(error, artifact, "the checkpoint lies in the artifact")
            assert_hints(error)
        assert cached.blob.read_bytes() == before

    def test_blob_of_two_names_is_refused(self, cached: Cached) -> None:
        before = cached.blob.read_bytes()
        os.link(cached.blob, cached.blobs / "other")
        with pytest.raises(reweft.UsageError) as error:
            reweft.refit(cached.link, cached.checkpoint, in_place=True)
        assert_says(error, cached.link, "hard links")
        assert_hints(error)
        assert cached.blob.read_bytes() == before
        assert leftovers(cached.blobs) == []

    @pytest.mark.parametrize("target", ["absent", "model"])
    def test_link_to_nothing_or_to_itself(self, target: str, cached: Cached) -> None:
        link = cached.folder / "model"
        link.symlink_to(target)
        with pytest.raises(reweft.IoError) as error:
            reweft.refit(link, cached.checkpoint, in_place=True)
        assert error.value.path == link


class TestCopyThroughALink:
    def test_artifact_is_read_and_its_copy_is_a_file(self, cached: Cached) -> None:
        out, before = cached.folder / "out", cached.blob.read_bytes()
        assert reweft.plan(cached.link, cached.checkpoint).ok
        assert not reweft.verify(cached.link, cached.checkpoint).equal
        reweft.refit(cached.link, cached.checkpoint, out=out)
        assert not out.is_symlink()
        assert out.read_bytes() == cached.refitted
        assert reweft.verify(out, cached.checkpoint).equal
        reweft.extract(cached.link, cached.folder / "weights.safetensors")
        reweft.extract(cached.blob, cached.folder / "same.safetensors")
        found = [(cached.folder / name).read_bytes() for name in ("weights.safetensors", "same.safetensors")]
        assert found[0] == found[1]
        cached.assert_link_is_there()
        assert cached.blob.read_bytes() == before

    def test_checkpoint_is_read(self, cached: Cached) -> None:
        link, out = cached.folder / "link.pt", cached.folder / "out"
        link.symlink_to(cached.checkpoint.name)
        reweft.refit(cached.blob, link, out=out)
        assert out.read_bytes() == cached.refitted

    @pytest.mark.parametrize("target", ["the artifact", "another file", "nothing", "a folder"])
    def test_link_at_the_output_is_replaced(self, target: str, cached: Cached) -> None:
        other, folder = cached.folder / "other", cached.folder / "folder"
        other.write_bytes(b"old")
        folder.mkdir()
        targets = {"the artifact": cached.blob, "another file": other, "nothing": cached.folder / "absent"}
        out, before = cached.folder / "out", cached.blob.read_bytes()
        out.symlink_to(targets.get(target, folder))
        reweft.refit(cached.blob, cached.checkpoint, out=out)
        assert not out.is_symlink()
        assert out.read_bytes() == cached.refitted
        assert cached.blob.read_bytes() == before
        assert other.read_bytes() == b"old"
        assert list(folder.iterdir()) == []
        assert not targets["nothing"].exists()
        assert leftovers(cached.folder) == []

    def test_link_that_is_both_artifact_and_output(self, cached: Cached) -> None:
        """The snapshot gets a file of its own, and the blob stays for others."""
        before = cached.blob.read_bytes()
        reweft.refit(cached.link, cached.checkpoint, out=cached.link)
        assert not cached.link.is_symlink()
        assert cached.link.read_bytes() == cached.refitted
        assert cached.blob.read_bytes() == before


class TestOutputThatIsTheCheckpoint:
    """Refused under every name, since the weights might be nowhere else."""

    def refused(self, cached: Cached, checkpoint: Path, out: Path) -> None:
        held = out.read_bytes()
        with pytest.raises(reweft.UsageError) as error:
            reweft.refit(cached.blob, checkpoint, out=out)
        assert_says(error, out, "checkpoint")
        assert out.read_bytes() == held
        assert leftovers(out.parent) == []

    @pytest.mark.parametrize("name", ["link", "hard link", "folder"])
    def test_by_another_name(self, name: str, cached: Cached) -> None:
        other = cached.folder / "other.pt"
        if name == "link":
            other.symlink_to(cached.checkpoint.name)
        elif name == "hard link":
            os.link(cached.checkpoint, other)
        else:
            (cached.folder / "here").symlink_to(cached.folder)
            other = cached.folder / "here" / cached.checkpoint.name
        self.refused(cached, cached.checkpoint, other)
        self.refused(cached, other, cached.checkpoint)

    @pytest.mark.parametrize("name", ["a.pt", "b.pt", "link", "model.pt.index.json"])
    def test_shard(self, name: str, cached: Cached) -> None:
        weights = state(1)
        for shard in ("a.pt", "b.pt"):
            save(
                {key: value for key, value in weights.items() if (key < "b") == (shard == "a.pt")},
                cached.folder / shard,
            )
        rows = {key: "a.pt" if key < "b" else "b.pt" for key in weights}
        index = cached.folder / "model.pt.index.json"
        index.write_text(json.dumps({"weight_map": rows}))
        (cached.folder / "link").symlink_to("b.pt")
        self.refused(cached, index, cached.folder / name)
        reweft.refit(cached.blob, index, out=cached.folder / "out")
        assert (cached.folder / "out").read_bytes() == cached.refitted


HOWS = ["to another file", "onto itself", "in place", "through a link"]


@pytest.mark.parametrize("how", HOWS)
class TestAttributes:
    """Of the artifact, whatever the output had and whatever the umask says."""

    def refit(self, how: str, cached: Cached) -> Path:
        """Refit; gives the file that was written."""
        if how == "to another file":
            (cached.folder / "out").write_bytes(b"old")
            (cached.folder / "out").chmod(0o700)
            reweft.refit(cached.blob, cached.checkpoint, out=cached.folder / "out")
            return cached.folder / "out"
        if how == "onto itself":
            reweft.refit(cached.blob, cached.checkpoint, out=cached.blob)
        else:
            reweft.refit(cached.link if how == "through a link" else cached.blob, cached.checkpoint, in_place=True)
        assert cached.blob.read_bytes() == cached.refitted
        return cached.blob

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o4755])
    def test_mode(self, mode: int, how: str, cached: Cached) -> None:
        cached.blob.chmod(mode)
        assert stat.S_IMODE(self.refit(how, cached).stat().st_mode) == mode

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another owner")
    def test_owner(self, how: str, cached: Cached) -> None:
        os.chown(cached.blob, 12345, 54321)
        cached.blob.chmod(0o640)
        found = self.refit(how, cached).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 54321, 0o640)

    def test_extended_attributes(self, how: str, cached: Cached) -> None:
        attributes = {"user.origin": b"run 7", "user.empty": b"", "user.long": bytes(range(256)) * 8}
        try:
            for name, value in attributes.items():
                os.setxattr(cached.blob, name, value)
        except OSError as error:
            pytest.skip(f"the file system keeps no extended attributes: {error}")
        if how in {"to another file", "onto itself"}:
            cached.blob.chmod(0o444)  # which only root gives attributes to
        out = self.refit(how, cached)
        assert {name: os.getxattr(out, name) for name in os.listxattr(out) if name.startswith("user.")} == attributes
