"""The stream of pickles of 2018, put together by hand: what its parts say of each other is compared."""

from __future__ import annotations

import io
import pickle
import struct
from typing import TYPE_CHECKING

import pytest
import torch

import reweft
from opcodes import FLOATS, number, pairs, storage, tensor, text, whole
from support import assert_says, raw

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = whole(b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")
VERSION = whole(b"M\xe9\x03")
INFO = whole(pairs(text("little_endian"), b"\x88"))
BIG_INFO = whole(pairs(text("little_endian"), b"\x89"))


def elements(*values: float, count: int | None = None, order: str = "<") -> bytes:
    """One storage as it stands at the end: how many elements, then they."""
    return struct.pack(f"{order}q", len(values) if count is None else count) + struct.pack(f"<{len(values)}f", *values)


def held(key: str = "0", view: bytes = b"N") -> bytes:
    return tensor(storage(key, view=view))


def window(first: int, numel: int) -> bytes:
    """What old files say of a storage that is a part of another."""
    return b"(" + text("view") + number(first) + number(numel) + b"t"


def listed(*keys: object) -> bytes:
    return pickle.dumps(list(keys), 2)


ONE, TWO = whole(pairs(text("w"), held())), whole(pairs(text("w"), held(), text("v"), held("1")))
GOOD = {
    "magic": MAGIC,
    "version": VERSION,
    "info": INFO,
    "object": ONE,
    "keys": listed("0"),
    "storages": elements(0, 1, 2, 3),
}
TWO_STORAGES = {"object": TWO, "storages": elements(0, 1, 2, 3) + elements(4, 5, 6, 7)}


def stream(**parts: bytes) -> bytes:
    return b"".join((GOOD | parts).values())


def test_the_stream_that_the_lies_are_made_of_is_read() -> None:
    assert bytes(reweft.open(stream())["w"].read()) == FLOATS
    both = stream(**TWO_STORAGES, keys=listed("0", "1"))
    assert reweft.open(both)["v"].numpy().tolist() == [4, 5, 6, 7]


LIES: dict[str, tuple[dict[str, bytes], str]] = {
    "magic that a call makes": (
        {"magic": whole(b"cbuiltins\nint\n" + text("1950a86a20f9469cfc6c") + b"K\x10\x86R")},
        "stand behind the pickle",
    ),
    "magic of another number": ({"magic": whole(b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x18")}, "stand behind the pickle"),
    "other version": ({"version": whole(b"M\xe8\x03")}, "int 1000, not 1001"),
    "version that is a float": ({"version": whole(b"G@\x8fH\0\0\0\0\0")}, "float 1001.0, not 1001"),
    "version that a call makes": ({"version": whole(b"cm\nf\n)R")}, "result of m.f, not 1001"),
    "no system info": ({"info": b""}, "0x"),
    "no keys": ({"keys": listed()}, "24 bytes stand behind the last storage"),
    "no keys and no storages": ({"keys": listed(), "storages": b""}, 'the file has no storage "0"'),
    "key that no tensor uses": ({"keys": listed("0", "1")}, 'storage "1" is in the file, but no tensor uses it'),
    "another key": ({"keys": listed("1")}, 'storage "1" is in the file, but no tensor uses it'),
    "key that is there twice": (
        {"keys": listed("0", "0"), "storages": elements(0, 1, 2, 3) * 2},
        'storage "0" is listed twice',
    ),
    "key less than tensors use": ({**TWO_STORAGES, "storages": elements(0, 1, 2, 3)}, 'the file has no storage "1"'),
    "key that is a number": ({"keys": listed(0)}, "a storage key is no text"),
    "keys that are a dict": ({"keys": pickle.dumps({"0": 0}, 2)}, "is no list"),
    "keys that are a set": ({"keys": pickle.dumps({"0"}, 2)}, "is no list"),
    "fewer elements": ({"storages": elements(0, 1, 2)}, "has 3 elements, its tensors say 4"),
    "more elements": ({"storages": elements(0, 1, 2, 3, 4)}, "has 5 elements, its tensors say 4"),
    "count less than elements": ({"storages": elements(0, 1, 2, 3, count=3)}, "4 bytes stand behind"),
    "count more than elements": ({"storages": elements(0, 1, 2, 3, count=5)}, "20 bytes wanted, 16 there"),
    "negative count": ({"storages": elements(0, 1, 2, 3, count=-1)}, "2^64"),
    "lowest count": ({"storages": elements(0, 1, 2, 3, count=-(2**63))}, "2^64"),
    "highest count": ({"storages": elements(0, 1, 2, 3, count=2**63 - 1)}, "2^64"),
    "count that overflows in bytes": ({"storages": elements(0, 1, 2, 3, count=2**62)}, "2^64"),
    "end in a storage": ({"storages": elements(0, 1, 2, 3)[:-1]}, "16 bytes wanted, 15 there"),
    "end in a count": ({"storages": elements(0, 1, 2, 3)[:5]}, "8 bytes wanted, 5 there"),
    "bytes behind": ({"storages": elements(0, 1, 2, 3) + b"x"}, "1 bytes stand behind the last storage"),
    "view that is longer": ({"object": whole(pairs(text("w"), held(view=window(0, 5))))}, "larger than its storage"),
    "view behind the storage": ({"object": whole(pairs(text("w"), held(view=window(4, 1))))}, "larger than its"),
    "view that ends behind it": ({"object": whole(pairs(text("w"), held(view=window(1, 4))))}, "larger than its"),
    "view that overflows": ({"object": whole(pairs(text("w"), held(view=window(2**62, 2**62))))}, "larger than"),
    "view at a negative place": ({"object": whole(pairs(text("w"), held(view=window(-1, 4))))}, "offset is int -1"),
    "view of negative size": ({"object": whole(pairs(text("w"), held(view=window(0, -1))))}, "size is int -1"),
    "view smaller than its tensor": ({"object": whole(pairs(text("w"), held(view=window(1, 3))))}, "storage has 12"),
    "view that is a pair": ({"object": whole(pairs(text("w"), held(view=text("v") + b"K\0\x86")))}, "no tuple of 3"),
    "view that is a number": ({"object": whole(pairs(text("w"), held(view=b"K\0")))}, "no tuple of 3"),
}


@pytest.mark.parametrize("name", LIES)
def test_lie(name: str, tmp_path: Path) -> None:
    parts, what = LIES[name]
    path = tmp_path / "x.pt"
    path.write_bytes(stream(**parts))
    said = []
    for source, mmap in ((path, False), (path, True), (path.read_bytes(), False)):
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
            reweft.open(source, mmap=mmap)
        assert_says(error, "<bytes>" if source is not path else path, what)
        said.append(str(error.value).partition(": ")[2])
    assert len(set(said)) == 1


@pytest.mark.parametrize("keys", [("0", "1"), ("1", "0")])
def test_storages_stand_in_the_order_of_the_list(keys: tuple[str, str]) -> None:
    """Writers sort it; torch takes it as it is."""
    data = stream(**TWO_STORAGES, keys=listed(*keys))
    wanted = torch.load(io.BytesIO(data))
    assert {key: bytes(info.read()) for key, info in reweft.open(data).items()} == {
        key: raw(value) for key, value in wanted.items()
    }


class TestByteOrder:
    """The system info says what machine wrote a stream; torch stores elements little-endian on every machine."""

    def test_stream_of_a_big_endian_machine_is_read_as_torch_reads_it(self) -> None:
        data = stream(info=BIG_INFO)
        assert raw(torch.load(io.BytesIO(data))["w"]) == FLOATS
        assert bytes(reweft.open(data)["w"].read()) == FLOATS

    def test_count_of_the_other_byte_order(self) -> None:
        """As the releases of 2018 wrote it on such machines: the count big-endian, its elements little-endian."""
        data = stream(info=BIG_INFO, storages=elements(0, 1, 2, 3, order=">"))
        try:
            found = bytes(reweft.open(data)["w"].read())
        except (reweft.FormatError, reweft.UnsupportedError):
            return
        assert found == FLOATS

    def test_count_of_the_other_byte_order_without_a_word_of_it(self) -> None:
        with pytest.raises(reweft.FormatError):
            reweft.open(stream(storages=elements(0, 1, 2, 3, order=">")))
