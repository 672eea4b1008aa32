"""Pickles that name callables, lie or break: nothing in them runs, and files, mappings and memory agree on them."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import reweft
from opcodes import FLOATS, archive, pairs, storage, tensor, text, whole
from support import assert_says

if TYPE_CHECKING:
    from pathlib import Path


def refusal(data: bytes, path: Path) -> str:
    """What is said of a file; the same of one that is read, one that is mapped and its bytes in memory."""
    path.write_bytes(data)
    said = []
    for source, mmap in ((path, False), (path, True), (data, False)):
        with pytest.raises(reweft.ReweftError) as error:
            reweft.open(source, mmap=mmap)
        name = "<bytes>" if source is data else path
        assert_says(error, f"{name}: ", "x/data.pkl")
        said.append(f"{type(error.value).__name__} {str(error.value).removeprefix(str(name))}")
    assert len(set(said)) == 1, said
    return said[0]


def makes(folder: object) -> dict[str, bytes]:
    """Opcodes that make a folder where a pickle is run, in each of the ways in which a pickle calls."""
    name = text(str(folder))
    return {
        "REDUCE": b"cos\nmkdir\n" + name + b"\x85R",
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93" + name + b"\x85R",
        "INST": b"(" + name + b"ios\nmkdir\n",
        "OBJ": b"(cos\nmkdir\n" + name + b"o",
    }


@pytest.mark.parametrize("opcode", makes(os.devnull))
def test_call_is_a_value_of_its_own(opcode: str, tmp_path: Path) -> None:
    folder = tmp_path / "made by the pickle"
    call = makes(folder)[opcode]
    path = tmp_path / "x.pt"
    path.write_bytes(archive(whole(pairs(text("w"), tensor(), text("evil"), call), 4)))
    checkpoint = reweft.open(path)
    assert list(checkpoint) == ["w"]
    assert bytes(checkpoint["w"].read()) == FLOATS
    assert "os.mkdir" in checkpoint.non_tensors["evil"]
    assert checkpoint.unknown_globals == ["os.mkdir"]
    with contextlib.suppress(reweft.ReweftError):
        reweft.load_config(path, top_level_key="evil")
    reweft.convert(path, tmp_path / "x.safetensors")
    assert not folder.exists()
    pickle.loads(whole(call, 4))  # noqa: S301
    assert folder.exists()  # the pickle does what it is said to do


@pytest.mark.parametrize(
    ("opcodes", "what"),
    [
        (b"\x82\x07)R", "extension"),
        (b"\x83\x07\x01)\x81", "extension"),
        (b"\x84\x07\0\0\x01)}\x92", "extension"),
        (b"cabsent_module\nClass\n)\x81", "absent_module.Class"),
        (b"cabsent_module\nClass\n)}\x92", "absent_module.Class"),
        (b"cabsent_module\nClass\n)\x81}b", "absent_module.Class"),
        (b"cabsent_module\nClass\n)\x81Na", "absent_module.Class"),
    ],
)
def test_object_of_a_class_that_is_not_there_is_a_value(opcodes: bytes, what: str) -> None:
    checkpoint = reweft.open(archive(whole(pairs(text("w"), tensor(), text("object"), opcodes), 4)))
    assert list(checkpoint) == ["w"]
    assert what in checkpoint.non_tensors["object"]


@pytest.mark.parametrize("opcodes", [b"%s\x85R", b")R%sb", b")\x81}%sNsb", b")R%sa"])
def test_tensor_that_a_call_takes_is_listed_and_cannot_be_read(opcodes: bytes) -> None:
    call = b"cabsent_module\nf\n" + opcodes % tensor()
    checkpoint = reweft.open(archive(whole(pairs(text("v"), tensor(), text("w"), call))))
    assert list(checkpoint.unreadable) == ["w"] or "absent_module.f" in checkpoint.non_tensors["w"]
    with pytest.raises((reweft.UnsupportedError, KeyError)):
        _ = checkpoint["w"]


def test_module_that_a_pickle_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_by_a_pickle.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = reweft.open(archive(whole(pairs(text("f"), b"cnamed_by_a_pickle\nf\n"))))
    assert checkpoint.unknown_globals == ["named_by_a_pickle.f"]
    assert "named_by_a_pickle" not in sys.modules


@pytest.mark.parametrize("before", [b"%s0", b"(%s1", b"(N%s1"])
def test_discarded_call_is_listed_and_a_broken_tail_leaves_nothing(before: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "made by the pickle"
    opcodes = before % makes(folder)["REDUCE"] + pairs(text("w"), tensor())
    assert reweft.open(archive(whole(opcodes))).unknown_globals == ["os.mkdir"]
    for tail in (b"\xff", b"0", b"h\x07", b"N", b"", b".N"):
        data = whole(opcodes)[:-1] + tail + (b"" if tail in {b"", b".N"} else b".")
        assert refusal(archive(data), tmp_path / "x.pt").startswith("FormatError"), tail
    assert not folder.exists()


def frame(nbytes: int, body: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", nbytes) + body


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends before STOP"),
    "no value": (b".", "STOP"),
    "two values": (whole(b"}}"), "STOP"),
    "value under a mark": (whole(b"(}"), "STOP"),
    "mark alone": (whole(b"("), "STOP"),
    "no STOP": (b"\x80\x02}", "ends before STOP"),
    "bytes behind STOP": (whole(b"}") + b"x", "1 bytes stand behind"),
    "memo that was not written": (whole(b"h\x05"), "never written"),
    "key without a value": (whole(b"}(NNNu"), "has no value"),
    "mark that is not there": (whole(b"}NNu"), "SETITEMS"),
    "items below a mark": (whole(b"}N(Ns"), "SETITEM"),
    "number of the memo that is negative": (whole(b"Np-1\n"), "PUT"),
    "length that is negative": (whole(b"T\xff\xff\xff\xff"), "is negative"),
    "length of 4 GiB": (whole(b"X\xff\xff\xff\xff"), "exceeds"),
    "length of 2^64-1": (whole(b"\x8e" + b"\xff" * 8, 4), "exceeds"),
    "unknown protocol": (whole(b"}", 6), "protocol 6 is unknown"),
    "protocol that lacks the opcode": (whole(b"\x8c\x01x", 3), "needs protocol 4"),
    "no protocol": (b"\x88.", "protocol 2"),
    "protocol said twice": (whole(b"\x80\x02}"), "PROTO"),
    "unknown opcode": (whole(b"}\xfe"), "not an opcode"),
    "frame behind the input": (frame(3, b"}."), "FRAME"),
    "frame as long as numbers go": (frame(2**64 - 1, b"}."), "FRAME"),
    "frame behind STOP": (frame(4, b"}.xx"), "frame"),
    "frame that ends in an argument": (frame(2, b"J\1\0\0\0."), "frame"),
    "frame in a frame": (frame(12, b"N\x95" + struct.pack("<Q", 1) + b"N\x86."), "FRAME"),
    "name that is not UTF-8": (whole(b"c\xff\nx\n"), "GLOBAL"),
    "name that is half a surrogate pair": (whole(b"c\xed\xa0\x80\nx\n"), "GLOBAL"),
    "text that is not UTF-8": (whole(b"X\x01\0\0\0\xff"), "not UTF-8"),
    "items of a text": (whole(text("x") + b"Na"), "cannot take"),
    "items of a tuple": (whole(b")NNs"), "cannot take"),
    "state of a dict": (whole(b"}}b"), "BUILD"),
    "members of a list": (whole(b"](N\x90", 4), "cannot take"),
    "items of a storage": (whole(pairs(text("w"), storage() + b"K\0K\0s")), "cannot take"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickle_is_refused_alike_by_every_source(name: str, tmp_path: Path) -> None:
    data, what = BROKEN[name]
    said = refusal(archive(data), tmp_path / "x.pt")
    assert said.startswith(("FormatError", "UnsupportedError"))
    assert what in said


@pytest.mark.parametrize("form", ["frame of all", "frames of nothing", "no frame"])
def test_frames_that_are_true_change_nothing(form: str, tmp_path: Path) -> None:
    body = pairs(text("w"), tensor()) + b"."
    start = {"frame of all": b"\x95" + struct.pack("<Q", len(body)), "frames of nothing": (b"\x95" + bytes(8)) * 3}
    data = archive(b"\x80\x04" + start.get(form, b"") + body)
    (tmp_path / "x.pt").write_bytes(data)
    for source in (tmp_path / "x.pt", data):
        assert bytes(reweft.open(source)["w"].read()) == FLOATS


class TestKeys:
    @pytest.mark.parametrize("second", [tensor(numel=2), b"N"])
    @pytest.mark.parametrize("first", [tensor(), b"N"])
    def test_key_that_is_there_twice(self, first: bytes, second: bytes, tmp_path: Path) -> None:
        said = refusal(archive(whole(pairs(text("w"), first, text("w"), second))), tmp_path / "x.pt")
        assert said.startswith("KeyCollisionError")
        assert 'the key "w" twice' in said

    def test_tensor_under_a_key_that_no_dict_takes(self, tmp_path: Path) -> None:
        for key in (b"]", b"}", b"\x8f"):
            said = refusal(archive(whole(pairs(key, tensor()), 4)), tmp_path / "x.pt")
            assert said.startswith("UnsupportedError")
            assert "for a key" in said

    def test_not_a_number_is_a_key_once(self, tmp_path: Path) -> None:
        """Python takes each for a key of its own; nothing could tell the two tensors apart."""
        nan = b"Fnan\n"
        assert len(reweft.open(archive(whole(pairs(nan, tensor()))))) == 1
        assert "twice" in refusal(archive(whole(pairs(nan, tensor(), nan, tensor()))), tmp_path / "x.pt")

    @pytest.mark.parametrize("same", [b"\x88", b"G?\xf0\0\0\0\0\0\0"])
    def test_numbers_that_are_one_key(self, same: bytes, tmp_path: Path) -> None:
        data = archive(whole(pairs(b"K\x01", tensor(), same, tensor(numel=2))))
        assert len(torch.load(io.BytesIO(data))) == 1
        assert "twice" in refusal(data, tmp_path / "x.pt")

    @pytest.mark.parametrize("value", [1e16, 1e-5, 2.5e300, -1e-7, 0.5, 1e15, 1e-4, float("inf"), float("nan")])
    def test_float_is_a_key_as_python_prints_it(self, value: float) -> None:
        key = b"G" + struct.pack(">d", value)
        assert list(reweft.open(archive(whole(pairs(key, tensor()))))) == [str(value)]

    @pytest.mark.parametrize("key", ["a\0b", "a\nb", "../a", "\u202ea"])
    def test_key_of_any_characters_is_kept(self, key: str) -> None:
        assert list(reweft.open(archive(whole(pairs(text(key), tensor()))))) == [key]

    @pytest.mark.parametrize("key", [b"X\x03\0\0\0\xed\xa0\x80", b"U\x01\xe4", b"C\x01a"])
    def test_key_that_is_no_text_of_unicode_is_refused(self, key: bytes, tmp_path: Path) -> None:
        assert "for a key" in refusal(archive(whole(pairs(key, tensor()), 3)), tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    {
        "SETITEM": b"K\0G?\xf0\0\0\0\0\0\0s",
        "SETITEMS": b"(K\0G?\xf0\0\0\0\0\0\0u",
        "APPEND": b"K\0a",
        "APPENDS": b"(K\0e",
        "ADDITEMS": b"(K\0\x90",
        "BUILD": b"(" + storage() + b"K\x01" + b"K\x02\x85K\x01\x85tb",
    }.items(),
    ids=lambda change: change[0],
)
def test_tensor_that_is_changed_after_it_was_made(change: tuple[str, bytes], tmp_path: Path) -> None:
    """torch puts elements into it, gives it another window, or refuses; its first bytes are never what it means."""
    said = refusal(archive(whole(pairs(text("w"), tensor() + change[1]), 4)), tmp_path / "x.pt")
    assert said.startswith(("FormatError", "UnsupportedError"))


def test_storage_that_is_on_two_devices(tmp_path: Path) -> None:
    state = pairs(text("a"), tensor(), text("b"), tensor(storage(location="cuda:0")))
    assert "described in two ways" in refusal(archive(whole(state)), tmp_path / "x.pt")
