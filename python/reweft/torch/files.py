"""Tensors to files and back, by the calls that users of `safetensors.torch` know."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reweft.checkpoint import open as open_checkpoint
from reweft.errors import UsageError
from reweft.refitting import convert
from reweft.torch.tensors import checkpoint_of, mapped_tensors

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["load_file", "save_file"]


def save_file(
    tensors: Mapping[str, torch.Tensor], filename: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors; `safetensors.torch`'s call of this name.

    The file appears whole or not at all: it is written beside `filename`, synced and renamed, so that whoever has the
    old file mapped keeps it. Tensors that are not contiguous, which the peer refuses, are written in row-major order;
    one whose elements are far apart (a transposed one) is held in memory a second time. Columns and other windows of
    one storage are separate tensors as long as they share no element.

    Args:
        tensors: Names and tensors, dense and on the CPU. They must not be changed meanwhile.
        filename: The file to write.
        metadata: Texts to keep in the file's header.

    Raises:
        MismatchError: Two tensors share elements, which the format cannot say; the message names them. `reweft.convert`
            has a choice (`shared="duplicate"`, `"drop-aliases"`).
        UnsupportedError: A value is no such tensor, or the format has no such dtype; the message names the key.
        UsageError: A name or a value of `metadata` is no text.
        IoError: Writing failed; `filename` is as it was.

    Example:
        >>> save_file({"a": torch.zeros(2, 3)}, "a.safetensors", {"epoch": "3"})  # doctest: +SKIP
    """
    for name, value in {**dict.fromkeys(tensors, ""), **(metadata or {})}.items():
        if not isinstance(name, str) or not isinstance(value, str):
            what = f"{name!r}: {value!r}" if metadata and name in metadata else repr(name)
            raise UsageError(f"{what}: names of tensors, and names and values of metadata, are texts")
    convert(checkpoint_of(tensors, metadata=metadata), filename, format="safetensors")


def load_file(filename: str | os.PathLike[str], device: str | int | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Read all tensors of a file; `safetensors.torch`'s call of this name. Takes every format that `reweft.open` does.

    The file is mapped: no byte is copied until it is read or written, and what is written to a tensor stays in this
    process. So the file must not be truncated or overwritten while the tensors live; replacing it by a rename, as
    `save_file` does, is safe. Tensors that do not start at a multiple of their element's size are copied.

    Args:
        filename: The file.
        device: Where the tensors are to be; a number stands for that CUDA device.

    Raises:
        FormatError: The file is damaged or truncated, or a CRC is wrong.
        UnsupportedError: It is no checkpoint, or holds a tensor that cannot be read; the message names the key.
        IoError: It cannot be read.

    Example:
        >>> load_file("a.safetensors")["a"].shape  # doctest: +SKIP
        torch.Size([2, 3])
    """
    found = mapped_tensors(open_checkpoint(filename).values())
    target = torch.device(device)
    return found if target.type == "cpu" else {key: value.to(target) for key, value in found.items()}
