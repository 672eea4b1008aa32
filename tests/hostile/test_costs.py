"""What hostile files cost a whole process: its memory at its largest; and that it ends in an error, not in a signal."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Opens, reads and converts what it can, and prints the kilobytes that this took beyond the imports. `ru_maxrss` would
# tell the size of the process that started this one.
SCRIPT = """
import pathlib, sys
import reweft

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

before = peak()
try:
    checkpoint = reweft.open(sys.argv[1])
    for info in checkpoint.values():
        info.read()
except reweft.ReweftError as error:
    print(type(error).__name__, str(error).splitlines()[0], file=sys.stderr)
print(peak() - before)
"""

# Beyond this, memory must be paid for by the size of the file.
FREE_KILOBYTES = 24_000


def measured(path: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout), done.stderr


def zipped(path: Path, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def around(data: bytes) -> dict[str, bytes]:
    return {"a/data.pkl": data, "a/version": b"3\n"}


def laughs() -> bytes:
    value: list[object] = [()]
    for _ in range(9):
        value = [value] * 10
    return pickle.dumps(value, 2)


def many_states() -> bytes:
    state = pickle.dumps({str(i): None for i in range(4_000)}, 2)[2:-1]
    return b"\x80\x02](" + state + b"r\xff\xff\0\0" + b"cm\nA\n)R" + b"j\xff\xff\0\0b" * 20_000 + b"e."


FILES: dict[str, Callable[[Path], Path]] = {
    "billion_laughs": lambda path: zipped(path, around(laughs())),
    "deep_lists": lambda path: zipped(path, around(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".")),
    "deep_tuples": lambda path: zipped(path, around(b"\x80\x02N" + b"\x85" * 1_000_000 + b".")),
    "many_marks": lambda path: zipped(path, around(b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".")),
    "many_states": lambda path: zipped(path, around(many_states())),
    "far_memo": lambda path: zipped(path, around(b"\x80\x02Nr\xff\xff\xff\xffN\x86.")),
    "length_of_4_gib": lambda path: zipped(path, around(b"\x80\x02X\xff\xff\xff\xffx.")),
    "million_keys": lambda path: zipped(path, around(pickle.dumps(dict.fromkeys(range(999_999)), 2))),
    "zeros_deflated": lambda path: zipped(path, around(b"\x80\x02" + b"N0" * 50_000_000 + b"N."), zipfile.ZIP_DEFLATED),
    "header_of_100_mb": lambda path: written(path, (10**8).to_bytes(8, "little") + b"{"),
    "json_lists": lambda path: written(path, (10**6 + 5).to_bytes(8, "little") + b'{"a":' + b"[" * 10**6),
}


@pytest.mark.parametrize("kind", FILES)
def test_memory_stays_within_a_multiple_of_the_file(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](tmp_path / "x.bin")
    kilobytes, said = measured(path)
    assert kilobytes <= 100 * path.stat().st_size / 1024 + FREE_KILOBYTES, said


def test_sparse_file_of_a_terabyte_is_an_error(tmp_path: Path) -> None:
    """The tensor that it states does not fit the memory, or the directory cannot be found; nothing ends the process."""
    header = b'{"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}'
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**40)
    kilobytes, said = measured(path)
    assert said.startswith("LimitError")
    assert "bytes of memory are not to be had" in said
    assert kilobytes < FREE_KILOBYTES
