"""Checkpoints: a mapping from keys to tensors, of which only metadata is read until a tensor is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reweft import _core
from reweft.errors import UnsupportedError
from reweft.keymap import KeyReport
from reweft.limits import given

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from reweft.keymap import KeyMap
    from reweft.limits import Limits

IN_MEMORY = "<bytes>"
"""Stands for the path of a checkpoint that was opened from bytes."""

__all__ = ["Checkpoint", "TensorInfo", "open"]


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """A tensor of a checkpoint: metadata, and its bytes on request."""

    key: str
    """The key, after any key map."""
    dtype: str
    """Name of the dtype as torch writes it, without `torch.`."""
    shape: tuple[int, ...]
    """Elements along each dimension."""
    strides: tuple[int, ...]
    """Elements between neighbours along each dimension."""
    nbytes: int
    """Bytes the tensor takes when it is contiguous."""
    storage: int
    """Number of the storage; tensors with one number share bytes."""
    storage_offset: int
    """First element within the storage."""
    _numpy: str | None = field(repr=False)
    _checkpoint: _core.Checkpoint = field(repr=False)

    def read(self) -> memoryview:
        """Read the bytes in row-major order. Reads them once and checks the CRC.

        Raises:
            FormatError: The file is truncated or damaged.
            IoError: It cannot be read.
        """
        return memoryview(self._checkpoint.read(self.key))

    def numpy(self) -> NDArray[np.generic]:
        """The tensor as a read-only array.

        With `open(..., mmap=True)`, or for a checkpoint in memory, no byte is copied and the strides are the
        tensor's own; otherwise the bytes are read into one new buffer in row-major order.

        Raises:
            UnsupportedError: numpy has no such dtype (bfloat16, float8); `read` gives the bytes and
                `reweft.torch.tensor` a torch tensor.
            FormatError: The file is truncated or damaged.
            IoError: It cannot be read.
        """
        if self._numpy is None:
            raise UnsupportedError(
                f"{self._checkpoint.path}: {self.key!r}: numpy has no dtype {self.dtype}",
                key=self.key,
                hint="read() gives the bytes, reweft.torch.tensor() a torch tensor",
            )
        dtype = np.dtype("<" + self._numpy)
        view = self._checkpoint.view(self.key)
        if view is None:
            return np.ndarray(self.shape, dtype, buffer=self.read())
        if self.nbytes == 0:
            return np.ndarray(self.shape, dtype, buffer=memoryview(view))
        strides = tuple(stride * dtype.itemsize for stride in self.strides)
        return np.ndarray(self.shape, dtype, buffer=memoryview(view), strides=strides)


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint under their keys, in file order. Made by `reweft.open`.

    Looking a key up reads nothing. Keys of tensors that reweft cannot read are listed too, and raise
    `UnsupportedError` when they are looked up.
    """

    def __init__(self, core: _core.Checkpoint) -> None:
        self._core = core

    @property
    def path(self) -> Path:
        """The file, or the name given for what is in memory."""
        return Path(self._core.path)

    @property
    def format(self) -> str:
        """The format that the content was found to be."""
        return self._core.format

    @property
    def non_tensors(self) -> dict[str, str]:
        """What the file holds that is no tensor: path and a short description."""
        return dict(self._core.values())

    @property
    def unreadable(self) -> dict[str, str]:
        """Keys of tensors that this version cannot read, with the reason."""
        return dict(self._core.unreadable())

    @property
    def unknown_globals(self) -> list[str]:
        """Classes and functions that the file names and reweft does not know; kept as data, never run."""
        return self._core.unknown_globals()

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__` of a safetensors file."""
        return dict(self._core.metadata())

    @property
    def notices(self) -> list[str]:
        """What a careful reader should know: records without a CRC, rules that matched nothing."""
        return self._core.notices()

    @property
    def key_report(self) -> KeyReport | None:
        """What the last key map did; None if there was none."""
        text = self._core.mapped()
        return None if text is None else KeyReport._parse(text)  # noqa: SLF001  (one package)

    def cast(self, dtype: str) -> Checkpoint:
        """Float tensors in another float dtype, rounded to nearest even; a notice names those that are not float.

        Reads nothing: elements are converted whenever they are read.

        Raises:
            UsageError: `dtype` is no float dtype.
        """
        return Checkpoint(self._core.cast(dtype))

    def rekey(self, keys: KeyMap) -> Checkpoint:
        """The same checkpoint under other names, and with what the key map makes of its tensors. Reads nothing.

        Raises:
            KeyCollisionError: Two keys get one name.
            NotFoundError: A selection matches no key, or a join lacks a part.
            UsageError: An operation does not fit its tensor, or the key map names a top-level key with which the
                checkpoint was not opened.
        """
        return Checkpoint(self._core.rekey(keys._core))  # noqa: SLF001  (one package)

    def __getitem__(self, key: str) -> TensorInfo:
        info = self._core.info(key)
        return TensorInfo(
            key=key,
            dtype=info.dtype,
            shape=tuple(info.shape),
            strides=tuple(info.strides),
            nbytes=info.nbytes,
            storage=info.storage,
            storage_offset=info.storage_offset,
            _numpy=info.numpy,
            _checkpoint=self._core,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._core.keys())

    def __len__(self) -> int:
        return len(self._core)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self._core

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {self.format}, {len(self)} tensors>"


def open(  # noqa: A001  (`reweft.open` is the name)
    path: str | os.PathLike[str] | bytes | bytearray | memoryview,
    *,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    mmap: bool = False,
    limits: Limits | None = None,
) -> Checkpoint:
    """Open a checkpoint without running anything in it. Reads metadata only; the format is found by content.

    Args:
        path: A file in any format of torch, or safetensors, whatever its name; or the bytes of one. `bytes` are
            used where they are, what can still be written to is copied.
        top_level_key: Dotted path of the dict that holds the weights, such as `model_state_dict`.
        keys: Which keys, under which names.
        mmap: Map the file instead of reading from it: no copies, but if another process truncates the file, this
            one ends with SIGBUS.
        limits: What reading may cost; None for the defaults.

    Raises:
        FormatError: The file is damaged; `.path`, `.record` and `.byte_offset` say where.
        UnsupportedError: It is something else than a checkpoint that reweft reads; the message says what.
        NotFoundError: The top-level key does not exist; the message lists those that do.
        KeyCollisionError: Two tensors have one key.
        LimitError: A named limit was reached.
        IoError: It cannot be read.

    Example:
        >>> checkpoint = reweft.open("epoch3.pt", top_level_key="model_state_dict")  # doctest: +SKIP
        >>> checkpoint["fc.weight"].shape  # doctest: +SKIP
        (10, 64)
    """
    core_keys = None if keys is None else keys._core  # noqa: SLF001  (one package)
    if isinstance(path, bytes | bytearray | memoryview):
        data = path if isinstance(path, bytes) else bytes(path)
        core = _core.Checkpoint.from_bytes(
            data, name=IN_MEMORY, top_level_key=top_level_key, keys=core_keys, limits=given(limits)
        )
    else:
        core = _core.Checkpoint.open(path, top_level_key=top_level_key, keys=core_keys, mmap=mmap, limits=given(limits))
    return Checkpoint(core)
