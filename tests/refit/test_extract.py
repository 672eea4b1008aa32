"""`reweft.extract`: ties and shared storages of artifacts, in formats that can say so and in those that cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import models
import reweft
from support import assert_hints, assert_says, leftovers, raw, save, save_state, storage_of

if TYPE_CHECKING:
    from pathlib import Path

    from support import Package

Shared = Literal["error", "duplicate", "drop-aliases"]
NAMES = {"embedding.weight", "head.weight"}


@pytest.fixture(params=["traced", "exported", "scripted", "pt"])
def artifact(request: pytest.FixtureRequest, tied: Package, tmp_path: Path) -> Path:
    """A tied weight in every kind of artifact, refitted, so that what is extracted is new."""
    path, out, module = tmp_path / "a.pt2", tmp_path / "b.pt2", tied.module(0)
    if request.param == "exported":
        torch.export.save(torch.export.export(module, tied.inputs), path)
    elif request.param == "scripted":
        torch.jit.save(torch.jit.script(module), str(path))
    elif request.param == "pt":
        save_state(module, path)
    reweft.refit(
        tied.path if request.param == "traced" else path, save_state(tied.module(1), tmp_path / "1.pt"), out=out
    )
    return out


@pytest.fixture
def wanted(tied: Package) -> bytes:
    """The bytes of the tied weight."""
    return raw(tied.module(1).state_dict()["head.weight"])


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated


class TestTied:
    def test_pt_keeps_the_tie(self, artifact: Path, wanted: bytes, tmp_path: Path) -> None:
        report = reweft.extract(artifact, tmp_path / "e.pt")
        assert (report.tensors, report.dropped_aliases) == (2, {})
        found = torch.load(tmp_path / "e.pt")
        assert set(found) == NAMES
        assert storage_of(found["embedding.weight"]) == storage_of(found["head.weight"])
        assert raw(found["embedding.weight"]) == raw(found["head.weight"]) == wanted
        # Written once: with the bytes of two it would be larger.
        assert (tmp_path / "e.pt").stat().st_size < len(wanted) * 2 + 1200
        module = models.Tied()
        module.load_state_dict(found)
        assert raw(module.head.weight) == wanted

    @pytest.mark.parametrize("suffix", ["safetensors", "npz"])
    def test_other_formats_ask_what_to_do(self, suffix: str, artifact: Path, tmp_path: Path) -> None:
        with pytest.raises(reweft.MismatchError) as error:
            reweft.extract(artifact, tmp_path / f"e.{suffix}")
        assert_says(error, artifact, *NAMES, "share bytes", suffix)
        assert_hints(error)
        assert not (tmp_path / f"e.{suffix}").exists()
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize("shared", ["duplicate", "drop-aliases"])
    @pytest.mark.parametrize("suffix", ["safetensors", "npz"])
    def test_other_formats_do_what_is_asked(
        self, suffix: str, shared: Shared, artifact: Path, wanted: bytes, tmp_path: Path
    ) -> None:
        out = tmp_path / f"e.{suffix}"
        report = reweft.extract(artifact, out, shared=shared)
        if suffix == "npz":
            with np.load(out) as arrays:
                found = {name: arrays[name].tobytes() for name in arrays.files}
        else:
            found = {name: raw(value) for name, value in safetensors.torch.load_file(out).items()}
        if shared == "duplicate":
            assert found == dict.fromkeys(NAMES, wanted)
        else:
            ((dropped, kept),) = report.dropped_aliases.items()
            assert found == {kept: wanted}
            assert {dropped, kept} == NAMES

    def test_what_was_extracted_goes_back(self, artifact: Path, tmp_path: Path) -> None:
        reweft.extract(artifact, tmp_path / "e.pt")
        assert reweft.verify(artifact, tmp_path / "e.pt").equal
        reweft.extract(artifact, tmp_path / "e.safetensors", shared="drop-aliases")
        assert reweft.verify(artifact, tmp_path / "e.safetensors").equal
        before = artifact.read_bytes()
        assert reweft.refit(artifact, tmp_path / "e.safetensors", in_place=True).slots_changed == 0
        assert artifact.read_bytes() == before


class Views(nn.Module):
    """Buffers that are views of one storage, and one that is turned."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(3, 4)
        self.register_buffer("whole", base)
        self.register_buffer("row", base[1])
        self.register_buffer("turned", torch.randn(2, 4).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_views_of_an_exported_program_stay_views(tmp_path: Path) -> None:
    module, package = models.seeded(Views, 0), tmp_path / "a.pt2"
    torch.export.save(torch.export.export(module, (torch.ones(1),)), package)
    reweft.extract(package, tmp_path / "e.pt")
    found = torch.load(tmp_path / "e.pt")
    for key, value in module.state_dict().items():
        assert (raw(found[key]), found[key].stride()) == (raw(value), value.stride()), key
    assert storage_of(found["row"]) == storage_of(found["whole"])
    found["whole"].zero_()
    assert not found["row"].any()
    with pytest.raises(reweft.MismatchError) as error:
        reweft.extract(package, tmp_path / "e.safetensors", shared="drop-aliases")
    assert_says(error, "whole", "row", "share bytes")
    reweft.extract(package, tmp_path / "e.safetensors", shared="duplicate")
    for key, value in safetensors.torch.load_file(tmp_path / "e.safetensors").items():
        assert raw(value) == raw(module.state_dict()[key]), key


def test_untied_copies_stay_apart(tmp_path: Path) -> None:
    """Equal values are no tie."""
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    reweft.extract(save(state, tmp_path / "x.pt"), tmp_path / "e.pt")
    found = torch.load(tmp_path / "e.pt")
    assert storage_of(found["a"]) != storage_of(found["b"])
    assert set(reweft.open(tmp_path / "e.pt")) == {"a", "b"}
