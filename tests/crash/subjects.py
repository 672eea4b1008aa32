"""What is rewritten and how: kinds of artifact and modes of refit, each in one table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file

from make import ROW, zipped
from reweft import _core
from support import NO_CALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# A large tensor, one that no refit changes, a small one, and others: about 150 KB.
SHAPES = {"a": (100, 100), "same": (50, 100), "b": (120, 100), "c": (16,), "d": (100, 100)}


class Kind(NamedTuple):
    """A format of artifacts; `write` makes one of a state."""

    suffix: str
    write: Callable[[dict[str, torch.Tensor], Path], object]


class Mode(NamedTuple):
    """Options of `reweft refit`, and which of the files they rewrite."""

    options: tuple[str, ...]
    rewrites: str


def state(seed: int) -> dict[str, torch.Tensor]:
    """Weights of a seed; the one that is called `same` is equal for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return found | {"same": torch.ones(SHAPES["same"])}


def _rows(weights: dict[str, torch.Tensor]) -> Iterator[str]:
    for i, (name, value) in enumerate(weights.items()):
        shape, stride = (", ".join(map(str, numbers)) for numbers in (value.shape, value.stride()))
        row = ROW.format(i=i, name=name, fqn=name, dtype="float32", kind="Parameter", shape=shape, stride=stride)
        yield row.replace("data_size = 64", f"data_size = {len(_padded(value))}")


def _padded(value: torch.Tensor) -> bytes:
    data = value.numpy().tobytes()
    return data.ljust(-(-len(data) // 64) * 64, b"\0")


def _write_package(weights: dict[str, torch.Tensor], path: Path) -> None:
    """An AOTInductor package around a library that is none, with a manifest."""
    model = "net/data/aotinductor/model/abc"
    records = {
        f"{model}.wrapper.cpp": "".join(_rows(weights)).encode(),
        f"{model}.wrapper_weights.blob": b"".join(map(_padded, weights.values())),
        f"{model}.wrapper.so": b"\x7fELF, but not really",
        "net/archive_format": b"pt2",
        "net/archive_version": b"0",
        "net/.data/version": b"6\n",
        "net/byteorder": b"little",
    }
    bare = path.with_name("bare.pt2")
    bare.write_bytes(zipped(records))
    tensors = [{"names": [name], "persistent": True, "mutated": False, "used": True} for name in weights]
    origins = {"torch": torch.__version__, "device": "cpu", **NO_CALL, "tensors": tensors}
    _core.seal(bare, json.dumps(origins), path)


KINDS = {
    "package": Kind(".pt2", _write_package),
    "pt": Kind(".pt", torch.save),
    "safetensors": Kind(".safetensors", save_file),
}
MODES = {
    "onto itself": Mode(("-o", "{artifact}"), "artifact"),
    "to another file": Mode(("-o", "{out}"), "out"),
    "in place": Mode(("--in-place",), "artifact"),
}
