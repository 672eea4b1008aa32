"""What is said about the host that a program was loaded on."""

from __future__ import annotations

__all__ = ["HostWarning"]


class HostWarning(UserWarning):
    """A program was compiled where something was otherwise, such as the version of torch. It runs all the same."""
