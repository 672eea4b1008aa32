"""What several test files use: packages, files of weights, bytes of tensors."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.serialization import config

import reweft
import reweft.torch as rt
from models import seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pytest


@dataclass(frozen=True)
class Package:
    """A compiled module on disk, made from the weights of seed 0. Tests must not change the file."""

    path: Path
    kind: type[nn.Module]
    inputs: tuple[torch.Tensor, ...]

    def module(self, seed: int) -> nn.Module:
        """The module that was compiled, with the weights of a seed."""
        return seeded(self.kind, seed)

    def load(self, *, replicas: int = 1) -> rt.CompiledModule:
        """The package as a live model of its own."""
        return rt.load(self.path, replicas=replicas)

    def eager(self, seed: int) -> Any:
        """What the module itself computes with the weights of a seed."""
        with torch.no_grad():
            return self.module(seed)(*self.inputs)


# How a program is called that has neither inputs nor results, as manifests state it.
NO_CALL: dict[str, Any] = {"inputs": [], "leaves": [], "outputs": [], "symbols": {}, "guards": []}


def without_crc(obj: object, path: Path) -> Path:
    """`torch.save` as people call it who found checksums too slow."""
    with config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        torch.save(obj, path)
    return path


def save(obj: object, path: Path) -> Path:
    """`torch.save` that gives the path."""
    torch.save(obj, path)
    return path


def save_state(module: nn.Module, path: Path) -> Path:
    """The state_dict of a module as a file."""
    return save(module.state_dict(), path)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    held = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    # One element counts as contiguous whatever its stride, which a view as bytes minds.
    held = held.as_strided((held.numel(),), (1,))
    return held.view(torch.uint8).numpy().tobytes() if held.numel() else b""


def storage_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that share bytes."""
    return tensor.untyped_storage().data_ptr()


def assert_same(left: Any, right: Any) -> None:
    """Same structure, and every tensor the same bit for bit."""
    (ours, our_spec), (theirs, their_spec) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert our_spec == their_spec
    for one, other in zip(ours, theirs, strict=True):
        if one is None:
            assert other is None
        else:
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert raw(one) == raw(other)


def differs(left: Any, right: Any) -> bool:
    """Whether any tensor of two equal structures has other bits."""
    pairs = zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True)
    return any(raw(one) != raw(other) for one, other in pairs if one is not None)


def stock(path: Path, *inputs: torch.Tensor) -> Any:
    """What torch's own loader computes with a package."""
    return torch._inductor.aoti_load_package(str(path))(*inputs)


def leftovers(folder: Path) -> list[str]:
    """Temporary files that a failed write left behind."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".reweft-"))


def assert_says(error: pytest.ExceptionInfo[reweft.ReweftError], *parts: object) -> None:
    """The message holds every part: file, key, found, wanted."""
    text = str(error.value)
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"


def assert_hints(error: pytest.ExceptionInfo[reweft.ReweftError]) -> None:
    """There is a hint, and the message ends with it."""
    assert error.value.hint
    assert str(error.value).endswith(f"hint: {error.value.hint}")


def record_at(path: Path, end: str) -> tuple[int, int]:
    """First byte and length of the data of the archive's record whose name ends so."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(end))
    header = path.read_bytes()[info.header_offset : info.header_offset + 30]
    skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + skip, info.file_size


def flip(path: Path, byte_offset: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[byte_offset] ^= 0x10
    path.write_bytes(data)


def saved_bytes(obj: object) -> bytes:
    """What `torch.save` writes, in memory."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def with_record(package: Path, out: Path, end: str, edit: Callable[[bytes], bytes]) -> Path:
    """A copy of a package with another content of the record whose name ends so, with right CRCs."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, edit(data) if name.endswith(end) else data)
    return out


def with_manifest(package: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a package whose manifest was edited, with right CRCs."""

    def edited(data: bytes) -> bytes:
        manifest = json.loads(data)
        edit(manifest)
        return json.dumps(manifest, separators=(",", ":")).encode()

    return with_record(package, out, "reweft_manifest.json", edited)


def child(
    code: str,
    *args: object,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
    before: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, which finds the tests' modules; `args` are its `sys.argv[1:]`.

    A command line `before` it may set something up.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    line = [*before, sys.executable, "-W", "error::UserWarning:reweft", "-c", code, *map(str, args)]
    settings = {**os.environ, "PYTHONPATH": path, **(env or {})}
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=timeout, env=settings)


TEST = re.compile(r"`([\w./-]+\.(?:py|rs))::(\w+)`")


def rows_of(document: Path) -> list[list[str]]:
    """The cells of a document's table, without head and rule."""
    rows = [line.strip("|").split("|") for line in document.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def assert_tests_exist(cell: str) -> None:
    """Every item of a list is a test, by its file and name."""
    for name in cell.split(", "):
        found = TEST.fullmatch(name)
        assert found, f"{name} is no test in a file"
        path, function = Path(__file__).parents[1] / found[1], found[2]
        assert path.is_file(), f"there is no file {found[1]}"
        keyword = "def" if path.suffix == ".py" else "fn"
        assert f"{keyword} {function}(" in path.read_text(), f"{found[1]} has no {function}"


@contextlib.contextmanager
def beside(job: Callable[[], object]) -> Iterator[None]:
    """Do a job over and over in a thread of its own meanwhile, once at least; what it raises is raised at the end."""
    done = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            job()
            while not done.is_set():
                job()
        except BaseException as error:  # noqa: BLE001  (raised below)
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(60)
    assert not thread.is_alive()
    if failed:
        raise failed[0]
