"""Exported programs beside the plain case: pickled payloads, older layouts, buffers that share a storage."""

from __future__ import annotations

import io
import logging
import shutil
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._export.serde.serialize import serialize
from torch.export.pt2_archive._package import load_pt2
from torch.testing._internal.two_tensor import TwoTensor

import reweft
from make import zipped
from models import seeded
from support import assert_hints, assert_same, assert_says, leftovers, raw, save, saved_bytes, storage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

INPUTS = (torch.arange(8.0).reshape(2, 4),)


class Pair(nn.Module):
    """A parameter of a class of its own, which torch pickles, between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.pair = nn.Parameter(TwoTensor(torch.randn(4), torch.randn(4)))
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.fc(x) * self.pair)
        return out


class Ties(nn.Module):
    """A tied weight, a buffer and a constant, which no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.register_buffer("steps", torch.randint(1, 99, (3,)))
        self.constant = torch.full((4,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tied(self.fc(x)) * self.constant + self.get_buffer("steps").sum()
        return out


def program(kind: type[nn.Module]) -> torch.export.ExportedProgram:
    return torch.export.export(seeded(kind, 0), INPUTS)


def as_now(kind: type[nn.Module], path: Path) -> None:
    """As torch of today writes it."""
    torch.export.save(program(kind), path)


def as_checkpoints(kind: type[nn.Module], path: Path) -> None:
    """As an earlier torch wrote it: checkpoints in place of records and their configuration."""
    as_now(kind, path)
    exported = program(kind)
    parts = {"weights": exported.state_dict, "constants": exported.constants}
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).partition("/")[0]
    for part, content in parts.items():
        records = {name: data for name, data in records.items() if not name.startswith(f"{root}/data/{part}/")}
        records[f"{root}/data/{part}/model.pt"] = saved_bytes(content)
    path.write_bytes(zipped(records))


def in_no_folder(kind: type[nn.Module], path: Path) -> None:
    """As torch up to 2.7 wrote it."""
    parts = serialize(program(kind))
    records = {
        "serialized_exported_program.json": parts.exported_program,
        "serialized_state_dict.pt": parts.state_dict,
        "serialized_constants.pt": parts.constants,
        "serialized_example_inputs.pt": parts.example_inputs,
        "version": b"8.8",
    }
    path.write_bytes(zipped(records))


def load(path: Path) -> torch.export.ExportedProgram:
    """torch's own loader, which may warn that a file is old; 2.13 has a placeholder too many in what it logs then."""
    logging.disable(logging.WARNING)
    try:
        loaded: torch.export.ExportedProgram = torch.export.load(path)
    finally:
        logging.disable(logging.NOTSET)
    return loaded


def run(path: Path) -> Any:
    with torch.no_grad():
        return plain(load(path).module()(*INPUTS))


def eager(kind: type[nn.Module], seed: int) -> Any:
    with torch.no_grad():
        return plain(seeded(kind, seed)(*INPUTS))


def plain(outputs: Any) -> Any:
    """What a tensor of two consists of."""
    return (outputs.a, outputs.b) if isinstance(outputs, TwoTensor) else outputs


def assert_whole(path: Path) -> None:
    """CRCs are right, also those of archives in the archive."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            content = archive.read(name)
            if content.startswith(b"PK"):
                assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None, name


LAYOUTS = [as_now, as_checkpoints, in_no_folder]
CASES = [(layout, kind) for layout in LAYOUTS for kind in (Pair, Ties)]


@pytest.mark.parametrize(("layout", "kind"), CASES, ids=lambda value: value.__name__)
def test_refit_of_every_layout(layout: Callable[..., None], kind: type[nn.Module], tmp_path: Path) -> None:
    package, out, extracted = tmp_path / "a.pt2", tmp_path / "b.pt2", tmp_path / "e.pt"
    layout(kind, package)
    assert_same(run(package), eager(kind, 0))
    before = package.read_bytes()
    old, new = (save(seeded(kind, seed).state_dict(), tmp_path / f"{seed}.pt") for seed in (0, 1))
    assert reweft.plan(package, new).ok
    assert reweft.verify(package, old).equal
    assert not reweft.verify(package, new).equal

    report = reweft.refit(package, new, out=out)
    assert report.kept == (("constant",) if kind is Ties else ())
    assert report.slots == report.slots_changed
    assert_same(run(out), eager(kind, 1))
    assert_whole(out)
    assert reweft.verify(out, new).equal
    assert differing_records(package, out) > 0

    shutil.copy(package, tmp_path / "c.pt2")
    reweft.refit(tmp_path / "c.pt2", new, in_place=True)
    assert (tmp_path / "c.pt2").read_bytes() == out.read_bytes()
    reweft.refit(tmp_path / "c.pt2", old, in_place=True)
    assert (tmp_path / "c.pt2").read_bytes() == before
    reweft.refit(package, old, out=tmp_path / "same.pt2")
    assert (tmp_path / "same.pt2").read_bytes() == before

    reweft.extract(out, extracted)
    found, wanted = torch.load(extracted), reweft.open(new)
    assert set(found) == set(wanted) | ({"constant"} if kind is Ties else set())
    for key, info in wanted.items():
        assert raw(found[key]) == bytes(info.read()), key
    if kind is Ties:
        assert storage_of(found["tied.weight"]) == storage_of(found["fc.weight"])
    assert leftovers(tmp_path) == []


def differing_records(left: Path, right: Path) -> int:
    """How many records differ; their names do not, and those of the program are the same."""
    with zipfile.ZipFile(left) as before, zipfile.ZipFile(right) as after:
        assert before.namelist() == after.namelist()
        names = [name for name in before.namelist() if before.read(name) != after.read(name)]
    assert all("weights" in name or "state_dict" in name for name in names), names
    return len(names)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_pickled_payload_that_does_not_fit(layout: Callable[..., None], tmp_path: Path) -> None:
    package = tmp_path / "a.pt2"
    layout(Pair, package)
    before = package.read_bytes()
    values = dict(seeded(Pair, 1).state_dict())
    values["pair"] = TwoTensor(torch.zeros(5), torch.zeros(5))
    for options in ({"out": tmp_path / "b.pt2"}, {"in_place": True}):
        with pytest.raises(reweft.MismatchError) as error:
            reweft.refit(package, save(values, tmp_path / "x.pt"), **options)
        assert_says(error, "pair.a", "found float32 [5]", "wanted float32 [4]")
        assert_hints(error)
    values["pair"] = torch.zeros(4)  # a plain tensor where there are two
    with pytest.raises(reweft.MismatchError) as error:
        reweft.refit(package, save(values, tmp_path / "x.pt"), in_place=True)
    assert_says(error, "pair", "pair.a", "pair.b")
    assert package.read_bytes() == before
    assert not (tmp_path / "b.pt2").exists()


class Halves(nn.Module):
    """Buffers on one storage that have no byte in common, and a parameter beside them."""

    first: torch.Tensor
    second: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(12)
        self.register_buffer("second", base[8:])
        self.register_buffer("first", base[:4])
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.first, x * self.second + self.weight


class Overlap(nn.Module):
    """Buffers on one storage with some elements in common, and a parameter beside them."""

    first: torch.Tensor
    second: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(6)
        self.register_buffer("first", base[:4])
        self.register_buffer("second", base[2:])
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.first, x * self.second + self.weight


class Part(Overlap):
    """The second buffer is a part of the first."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(4)
        self.register_buffer("first", base)
        self.register_buffer("second", base[:2])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.first, x[:, :2] * self.second + self.weight[:2]


class Gaps(Overlap):
    """The second buffer lies among the elements of the first."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(12)
        self.register_buffer("first", base[::3])
        self.register_buffer("second", base[6:10])


class TestSharedStorage:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
    def test_halves_are_refitted(self, layout: Callable[..., None], tmp_path: Path) -> None:
        package, out = tmp_path / "a.pt2", tmp_path / "b.pt2"
        layout(Halves, package)
        before = package.read_bytes()
        # Of a storage each, and of one as in the package.
        shared = dict(seeded(Halves, 1).state_dict())
        apart = {key: value.clone() for key, value in shared.items()}
        for values in (shared, apart):
            new = save(values, tmp_path / "new.pt")
            reweft.refit(package, new, out=out)
            assert_same(run(out), eager(Halves, 1))
            assert reweft.verify(out, new).equal
        loaded = load(out).state_dict
        assert storage_of(loaded["first"]) == storage_of(loaded["second"])
        reweft.refit(out, save(seeded(Halves, 0).state_dict(), tmp_path / "old.pt"), in_place=True)
        assert out.read_bytes() == before

    @pytest.mark.parametrize("values", ["agree", "differ"])
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
    def test_some_bytes_in_common_are_refused(self, layout: Callable[..., None], values: str, tmp_path: Path) -> None:
        package = tmp_path / "a.pt2"
        layout(Overlap, package)
        new = dict(seeded(Overlap, 1).state_dict())
        if values == "differ":
            new = {key: torch.randn_like(value) for key, value in new.items()}
        for key, other in [("first", "second"), ("second", "first")]:
            self.refused(package, new, key, f'shares some of its bytes with "{other}"')
        # Nor one of them alone: the other would change with it.
        for key in ("first", "second"):
            self.refused(package, {key: new[key]}, key, "shares some of its bytes", allow_missing=True)
        reweft.refit(package, save({"weight": new["weight"]}, tmp_path / "w.pt"), in_place=True, allow_missing=True)
        assert_same(load(package).state_dict["weight"].detach(), new["weight"].detach())
        assert_same(load(package).state_dict["first"], seeded(Overlap, 0).state_dict()["first"])

    def test_view_with_gaps_and_what_lies_in_them(self, tmp_path: Path) -> None:
        package = tmp_path / "a.pt2"
        in_no_folder(Gaps, package)
        new = dict(seeded(Gaps, 1).state_dict())
        self.refused(package, new, "first", "a view with gaps")
        self.refused(package, {"second": new["second"]}, "second", 'among the bytes of "first"', allow_missing=True)

    def refused(self, package: Path, values: Mapping[str, torch.Tensor], key: str, why: str, **allowed: Any) -> None:
        before, out = package.read_bytes(), package.with_name("b.pt2")
        new = save(dict(values), package.with_name("new.pt"))
        findings = {finding.key: finding for finding in reweft.plan(package, new, **allowed).findings}
        assert (findings[key].kind, findings[key].blocking) == ("unrefittable", True)
        assert why in findings[key].what
        targets: list[dict[str, Any]] = [{"out": out}, {"in_place": True}]
        for options in targets:
            with pytest.raises(reweft.MismatchError) as error:
                reweft.refit(package, new, **allowed, **options)
            assert_says(error, package, key, why)
        assert package.read_bytes() == before
        assert not out.exists()
        assert leftovers(package.parent) == []

    def test_weights_beside_a_compiled_program(self, tmp_path: Path) -> None:
        """`pickle_weights` puts a storage there once, while the program has a row for each buffer."""
        package = tmp_path / "a.pt2"
        options = {
            "aot_inductor.package_constants_on_disk_format": "pickle_weights",
            "aot_inductor.package_constants_in_so": False,
            "always_keep_tensor_constants": True,
        }
        torch._inductor.aoti_compile_and_package(program(Part), package_path=str(package), inductor_configs=options)
        new = dict(seeded(Part, 1).state_dict())
        self.refused(package, new, "first", 'shares some of its bytes with "second"')
        values = save({"weight": new["weight"]}, tmp_path / "w.pt")
        reweft.refit(package, values, in_place=True, allow_missing=True)
        wanted = seeded(Part, 0)
        wanted.weight = seeded(Part, 1).weight
        loaded = load_pt2(str(package), load_weights_from_disk=True).aoti_runners["model"]
        torch.testing.assert_close(loaded(*INPUTS), list(wanted(*INPUTS)), rtol=1e-6, atol=1e-6)
