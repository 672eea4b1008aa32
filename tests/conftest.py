"""Compiled models, each compiled once: a compilation takes 8 to 17 seconds."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

import models
import reweft.torch as rt
from support import Package

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn


def pytest_configure(config: pytest.Config) -> None:
    # torch.export says it of every LSTM; it is raised through contextlib, so the filter for torch's modules misses it.
    config.addinivalue_line("filterwarnings", "ignore:The tensor attributes self.rnn._flat_weights:UserWarning")
    # torch 2.13 says it of every program that it copies, through copyreg.
    config.addinivalue_line("filterwarnings", "ignore:.isinstance.treespec, LeafSpec.:FutureWarning")


@pytest.fixture(scope="session", autouse=True)
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of compiled libraries of the tests' own; the user's is left alone."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("REWEFT_CACHE_DIR")
    os.environ["REWEFT_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["REWEFT_CACHE_DIR"]
    else:
        os.environ["REWEFT_CACHE_DIR"] = before


def _checked(package: Package) -> Iterator[Package]:
    """Hand a package to all tests, and see at the end that none of them changed it."""
    before = hashlib.sha256(package.path.read_bytes()).digest()
    yield package
    assert hashlib.sha256(package.path.read_bytes()).digest() == before


def _traced(folders: pytest.TempPathFactory, kind: type[nn.Module], *inputs: torch.Tensor) -> Iterator[Package]:
    path = folders.mktemp("packages") / f"{kind.__name__.lower()}.pt2"
    rt.save(rt.trace(models.seeded(kind, 0), inputs), path)
    yield from _checked(Package(path, kind, inputs))


def _stock(folders: pytest.TempPathFactory, name: str, options: dict[str, Any]) -> Iterator[Package]:
    """A package that torch made without reweft."""
    path = folders.mktemp("packages") / f"{name}.pt2"
    inputs = (torch.randn(2, 16),)
    with torch.no_grad():
        program = torch.export.export(models.seeded(models.Small, 0), inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    yield from _checked(Package(path, models.Small, inputs))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Digits, torch.randn(2, 1, 8, 8))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Tied, torch.arange(6).reshape(2, 3))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Mixed, torch.randn(2, 3, 6, 6))


@pytest.fixture(scope="session")
def views(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Views, torch.randn(2, 4))


@pytest.fixture(scope="session")
def half_width(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.HalfWidth, torch.randn(3, 8, dtype=torch.bfloat16))


@pytest.fixture(scope="session")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Counter, torch.ones(4))


@pytest.fixture(scope="session")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Recurrent, torch.randn(2, 5, 4))


@pytest.fixture(scope="session")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    yield from _traced(tmp_path_factory, models.Weightless, torch.randn(2, 3), torch.randn(2, 3))


@pytest.fixture(scope="session")
def stock_embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    """Weights inside the library: what torch does by default."""
    yield from _stock(tmp_path_factory, "embedded", {})


@pytest.fixture(scope="session")
def stock_blob(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    """Weights beside the library, small ones compiled into the code."""
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "binary_blob",
    }
    yield from _stock(tmp_path_factory, "blob", options)


@pytest.fixture
def digits_b(digits: Package, tmp_path: Path) -> Path:
    """A checkpoint file with other weights for `digits`."""
    path = tmp_path / "b.pt"
    torch.save(digits.module(1).state_dict(), path)
    return path


@pytest.fixture(params=["digits", "tied", "mixed", "views", "half_width", "counter", "recurrent"])
def package(request: pytest.FixtureRequest) -> Package:
    """Each traced package with weights in turn."""
    found: Package = request.getfixturevalue(request.param)
    return found
