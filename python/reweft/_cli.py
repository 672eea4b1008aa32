"""The console script `reweft`: the binary's library, called through the extension module."""

from __future__ import annotations

import signal
import sys

from reweft import _core


def main() -> int:
    """Run the command line; gives the exit code."""
    # Python's handler would wait for Rust to return; the default ends the command at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _core.main(["reweft", *sys.argv[1:]])
