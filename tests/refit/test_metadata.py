"""`inspect` and `plan` read metadata only: their reads of a large artifact are counted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from torch import nn

import models
import reweft.torch as rt
from bench.processes import command
from crash.harness import needs_strace, run
from support import save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    needs_strace,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit is deprecated
]

WIDTH = 4096
# 64 MiB, far more than all code and metadata of any kind.
WEIGHT_NBYTES = 4 * WIDTH * WIDTH
# What is read whatever the file: its end, where an archive has its directory, up to three times until its kind is known
# or the first block of a pickle, whose length the legacy stream does not state.
ENDS_NBYTES, BLOCK_NBYTES = 3 * (66 << 10), 1 << 20


class Wide(nn.Module):
    """One large weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x)
        return out


def exported() -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(models.seeded(Wide, 0), (torch.randn(2, WIDTH),))


def compiled(**options: Any) -> Callable[[Path], object]:
    """A package that torch makes with options of the compiler."""
    configs = {f"aot_inductor.{name}": value for name, value in options.items()}

    def write(path: Path) -> object:
        return torch._inductor.aoti_compile_and_package(exported(), package_path=str(path), inductor_configs=configs)

    return write


def state() -> dict[str, torch.Tensor]:
    return dict(models.seeded(Wide, 0).state_dict())


ARTIFACTS: dict[str, Callable[[Path], object]] = {
    "traced": lambda path: rt.save(rt.trace(models.seeded(Wide, 0), (torch.randn(2, WIDTH),)), path),
    "in the library": compiled(),
    "as checkpoints": compiled(package_constants_on_disk_format="pickle_weights", package_constants_in_so=False),
    "exported": lambda path: torch.export.save(exported(), path),
    "scripted": lambda path: torch.jit.save(torch.jit.script(models.seeded(Wide, 0)), str(path)),
    "pt": lambda path: torch.save(state(), path),
    "legacy": lambda path: torch.save(state(), path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: safetensors.torch.save_file(state(), path),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(models.seeded(Wide, 1).state_dict(), tmp_path_factory.mktemp("new") / "new.pt")


@pytest.fixture(scope="module", params=ARTIFACTS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "artifact.pt2"
    ARTIFACTS[request.param](path)
    return path


def nbytes_read(line: list[str], path: Path, log: Path) -> int:
    """How many bytes of a file a command reads; it maps none of it."""
    calls = "read,readv,pread64,preadv,preadv2,mmap,copy_file_range,sendfile"
    code, stderr = run(["strace", "-f", "-y", "-qq", "-o", str(log), "-e", f"trace={calls}", *line])
    assert code == 0, stderr
    text = log.read_text(errors="replace")
    assert not re.search(rf"(mmap|copy_file_range|sendfile)\(.*<{re.escape(str(path))}>", text)
    found = re.findall(rf"read\w*\(\d+<{re.escape(str(path))}>.* = (\d+)$", text, re.MULTILINE)
    assert found
    return sum(map(int, found))


def metadata_nbytes(path: Path) -> int:
    """All of the file that is no weight."""
    return path.stat().st_size - WEIGHT_NBYTES


def is_legacy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_reads_are_bounded_by_the_metadata(verb: str, artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(artifact)] if verb == "inspect" else [str(artifact), str(checkpoint)]
    line = [command(), verb, *arguments, "--json"]
    for path in [artifact, checkpoint][: len(arguments)]:
        found = nbytes_read(line, path, tmp_path / "log")
        always = ENDS_NBYTES + (BLOCK_NBYTES if is_legacy(path) else 0)
        assert found <= 2 * metadata_nbytes(path) + always
