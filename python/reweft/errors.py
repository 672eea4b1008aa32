"""The exceptions of reweft. All derive from `ReweftError`, and from the built-in class a caller would expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "FormatError",
    "IoError",
    "KeyCollisionError",
    "LimitError",
    "MismatchError",
    "NotFoundError",
    "ReweftError",
    "RunError",
    "UnsupportedError",
    "UsageError",
]


class ReweftError(Exception):
    """What all exceptions of reweft derive from.

    The message says what, where, found and wanted; the attributes hold the parts.
    """

    path: Path | None = None
    """The file, if known."""
    record: str | None = None
    """The record of the archive, if known."""
    byte_offset: int | None = None
    """Where it is: in `record` if that is named, else in the file."""
    key: str | None = None
    """The key or slot, if known."""
    hint: str | None = None
    """What to do about it; also the last line of the message."""

    def __init__(self, message: str = "", *, key: str | None = None, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.key = key
        self.hint = hint

    def __str__(self) -> str:
        """The message as it is; `KeyError` would print its repr."""
        return str(self.args[0]) if self.args else ""


class FormatError(ReweftError, ValueError):
    """A file is damaged, truncated or contradicts itself."""


class UnsupportedError(ReweftError, ValueError):
    """A file is sound, but this version does not handle what it holds."""


class LimitError(ReweftError, ValueError):
    """Reading would cost more than a named limit allows."""


class NotFoundError(ReweftError, KeyError):
    """A key, slot or record of that name does not exist."""


class KeyCollisionError(ReweftError, ValueError):
    """Two keys were mapped to one name."""


class MismatchError(ReweftError, ValueError):
    """Checkpoint and model do not fit each other. Nothing was changed."""


class RunError(ReweftError, RuntimeError):
    """The loader refused a compiled program, or the program failed."""


class UsageError(ReweftError, ValueError):
    """The arguments contradict each other or are malformed."""


class IoError(ReweftError, OSError):
    """The operating system refused to open, read, write, sync or rename."""
