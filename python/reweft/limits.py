"""What reading a file may cost, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what a file can make the reader allocate or repeat. None stands for the default.

    A `LimitError` names the limit that was reached. Raise it for a file that you trust; lower it where strangers' files
    must cost less.

    Example:
        >>> checkpoint = reweft.open("huge.pt", limits=reweft.Limits(max_keys=5_000_000))  # doctest: +SKIP
    """

    max_keys: int | None = None
    """Keys of one checkpoint; 1,000,000."""
    max_key_nbytes: int | None = None
    """Bytes of one key; 4096. It bounds how deep containers nest."""
    max_expansion: int | None = None
    """Steps and bytes that shared containers may unfold to for each byte of the pickle; 64."""
    max_metadata_nbytes: int | None = None
    """Bytes of one pickle or other record that is read whole; 1 GiB."""
    max_inflation: int | None = None
    """Bytes that one byte of a compressed pickle may unpack to; 100."""
    max_repeated_nbytes: int | None = None
    """Bytes of a tensor that repeats its storage, when it is read; 1 GiB."""
    max_header_nbytes: int | None = None
    """Bytes of a safetensors header; 100,000,000, as the format says."""
    max_nodes: int | None = None
    """Values in one pickle; 2**26."""
    max_memo: int | None = None
    """Values that a pickle remembers for later use; 2**26."""
    max_int_digits: int | None = None
    """Decimal digits of an integer that a pickle writes as text; 4300, as in Python."""

    def given(self) -> dict[str, int]:
        """The limits that are not left to their defaults."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if value is not None}


def given(limits: Limits | None) -> dict[str, int]:
    """The limits that a caller set."""
    return {} if limits is None else limits.given()
