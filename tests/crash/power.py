"""Disks of one file each that can lose power: ext4 on a loop device, shut down without writing anything more."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .harness import no_strace

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux: fs/ext4/ext4.h.
EXT4_IOC_SHUTDOWN = 0x8004587D
FLUSH_JOURNAL, FLUSH_NOTHING = 1, 2
# linux: include/uapi/linux/fs.h; wait before, write, wait after.
SYNC_FILE_RANGE_ALL = 1 | 2 | 4

TOOLS = ("strace", "mkfs.ext4", "losetup", "mount", "umount")
# Tries to unmount, 20 ms apart.
PATIENCE = 100
_LIBC = ctypes.CDLL(None, use_errno=True)


def missing() -> str | None:
    """Why there can be no disks here."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(absent)}: not installed" if absent else no_mounts() or no_strace()


@cache
def no_mounts() -> str | None:
    """Why nothing can be mounted here; containers may forbid it to root as well."""
    if os.geteuid() != 0:
        return "mounting needs root"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tmpfs(Path(folder) / "x", 1 << 20):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"nothing can be mounted: {error}"


def command(*line: object) -> str:
    """Run a tool; gives what it prints."""
    done = subprocess.run([str(word) for word in line], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@contextlib.contextmanager
def tmpfs(point: Path, nbytes: int) -> Iterator[None]:
    """A file system in memory of some size."""
    point.mkdir()
    command("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", point)
    try:
        yield
    finally:
        unmount(point)


def unmount(point: Path) -> None:
    """Unmount; a process that another thread starts has our open files until it runs its program."""
    for _ in range(PATIENCE):
        try:
            command("umount", point)
        except subprocess.CalledProcessError:
            time.sleep(0.02)
        else:
            return
    command("umount", point)


@dataclass
class Disk:
    """An ext4 in a file, of which a crash leaves what had reached the file."""

    folder: Path
    options: str = ""
    device: str = field(init=False)

    def __post_init__(self) -> None:
        image = self.folder / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        self.point.mkdir()
        command("mkfs.ext4", "-q", "-F", image)
        self.device = command("losetup", "-f", "--show", image)

    @property
    def point(self) -> Path:
        """Where it is mounted."""
        return self.folder / "mounted"

    def mount(self) -> None:
        command("mount", "-t", "ext4", "-o", self.options or "defaults", self.device, self.point)

    def unmount(self) -> None:
        unmount(self.point)

    def release(self) -> None:
        """Give the device back; mounted or not."""
        if os.path.ismount(self.point):
            self.unmount()
        command("losetup", "-d", self.device)

    def sync(self) -> None:
        with opened(self.point) as number:
            checked(_LIBC.syncfs(number))

    def cut(self, how: int) -> None:
        """The power is off: what is not on the disk never will be."""
        with opened(self.point) as number:
            fcntl.ioctl(number, EXT4_IOC_SHUTDOWN, struct.pack("I", how))


def write_back(path: Path, byte_offset: int, nbytes: int) -> None:
    """What the kernel may do at any time: write some pages of a file."""
    with opened(path) as number:
        offsets = ctypes.c_int64(byte_offset), ctypes.c_int64(nbytes)
        checked(_LIBC.sync_file_range(number, *offsets, SYNC_FILE_RANGE_ALL))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
