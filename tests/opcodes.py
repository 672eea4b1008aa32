"""Pickles put together by hand, and the files around them: what no writer of checkpoints says."""

from __future__ import annotations

import io
import struct
import zipfile

FLOATS = struct.pack("<4f", 0, 1, 2, 3)
# Calls around a tensor have its hooks as an argument: an empty ordered dict.
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    """A str."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """An int of 64 bits with a sign."""
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(key: str = "0", *, numel: int = 4, kind: str = "Float", location: str = "cpu", view: bytes = b"") -> bytes:
    """A persistent id; streams before the zip archive have a sixth part, which is None or a view."""
    parts = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text(location) + number(numel)
    return b"(" + parts + view + b"tQ"


def tensor(held: bytes | None = None, *, numel: int = 4) -> bytes:
    """A tensor of one dimension at the start of its storage."""
    shape = number(numel) + b"\x85" + number(1) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + (held or storage()) + b"K\0" + shape + b"\x89" + HOOKS + b"tR"


def pairs(*items: bytes) -> bytes:
    """A dict of keys and values by turns."""
    return b"}(" + b"".join(items) + b"u"


def whole(opcodes: bytes, protocol: int = 2) -> bytes:
    """A pickle of one value."""
    return b"\x80" + bytes([protocol]) + opcodes + b"."


def archive(pickled: bytes, *storages: bytes) -> bytes:
    """What torch.save writes, around a pickle and storages with the keys 0, 1, and so on."""
    records = {"x/data.pkl": pickled}
    records |= {f"x/data/{key}": content for key, content in enumerate(storages or (FLOATS,))}
    return zipped(records | {"x/version": b"3\n"})


def zipped(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, content in records.items():
            out.writestr(name, content)
    return buffer.getvalue()
