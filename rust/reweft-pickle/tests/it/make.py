"""Prints real pickles and what they hold, one tab-separated record per line, for `main.rs`."""

import _compat_pickle
import collections
import datetime
import decimal
import enum
import io
import pathlib
import pickle
import pickletools
import struct


class Plain:
    pass


class Slots:
    __slots__ = ("a",)


class Kwargs:
    def __new__(cls, *, size):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"size": 3}


class DictLike(dict):
    pass


class Colour(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


def show(v):
    """A canonical text that `main.rs` makes from the parsed pickle on its own."""
    kind = type(v)
    items = lambda it: "".join(show(x) + "," for x in it)
    pairs = lambda d: "".join(show(k) + ":" + show(x) + "," for k, x in d.items())
    if v is None or kind in (bool, int):
        return str(v)
    if kind is float:
        return "f" + struct.pack(">d", v).hex()
    if kind is complex:
        return "c" + show(v.real) + show(v.imag)
    if kind is str:
        return "s" + v.encode("utf-8", "surrogatepass").hex()
    if kind is bytes:
        return "b" + v.hex()
    if kind is bytearray:
        return "B" + v.hex()
    if kind is tuple:
        return "(" + items(v) + ")"
    if kind is list:
        return "[" + items(v) + "]"
    if kind is dict:
        return "{" + pairs(v) + "}"
    if kind in (set, frozenset):
        return kind.__name__ + "{" + "".join(sorted(show(x) + "," for x in v)) + "}"
    if kind in (collections.OrderedDict, collections.defaultdict, collections.Counter, DictLike):
        return kind.__name__ + "{" + pairs(v) + "}"
    if isinstance(v, type):
        return "<" + v.__module__ + "." + v.__qualname__ + ">"
    if kind is Plain:
        return "Plain" + show(v.__dict__)
    raise TypeError(kind)


def values():
    plain = Plain()
    plain.weight, plain.name = [1.5, 2], "net"
    shared = ["x"]
    yield "none", None
    yield "bools", [True, False, True]
    yield "ints", [
        s * (1 << n) + d
        for n in (0, 7, 8, 15, 16, 31, 32, 62, 63, 64, 65, 127, 128, 2039, 2040, 9000)
        for s in (1, -1)
        for d in (-1, 0, 1)
    ]
    yield "floats", [0.0, -0.0, 1.5, -2.25, 1e308, 5e-324, 0.1, float("inf"), float("-inf"), float("nan")]
    yield "complex", 1.5 - 2j
    yield "strings", ["", "a", "\n\\u0041\\\r\0", "\u20ac\xe4\u1234", "\U0001f600", "\ud800", "\udfff\ud800x", "q'\"" * 100]
    yield "long string", "\u00e4" * 70_000
    yield "bytes", [b"", b"\0\xff\n", bytes(range(256)), bytearray(b""), bytearray(b"\x80y")]
    yield "long bytes", [b"x" * 70_000, bytearray(b"y" * 70_000), 1]
    yield "tuples", [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))]
    yield "lists", [[], [1], [[2, [3]]], list(range(3000))]
    yield "dicts", [{}, {"a": 1}, {1: {2: {3: None}}, (1, 2): []}, {i: str(i) for i in range(2500)}]
    yield "sets", [set(), {1, 2, 3}, frozenset(), frozenset({"a", b"b"}), set(range(1200))]
    yield "dict classes", [
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.defaultdict(list, {"k": [1]}),
        collections.Counter("hello"),
        DictLike(x=1),
    ]
    yield "classes", [int, str, collections.OrderedDict, Plain, range]
    yield "instance", plain
    yield "shared", [shared, shared, (shared,)]


def unshown():
    """Values that need only be read, not understood."""
    slots = Slots()
    slots.a = 1
    deque = collections.deque([1, 2], maxlen=4)
    loop_tuple = ([],)
    loop_tuple[0].append(loop_tuple)
    yield from (slots, deque, loop_tuple, Point(1, [2]), Colour.RED, range(3), slice(1, 2), ValueError("x"))
    yield from (datetime.datetime(2020, 1, 2), decimal.Decimal("1.5"), pathlib.PurePosixPath("/a/b"))
    yield from (print, collections.abc.Mapping, Ellipsis, NotImplemented, {"k": Plain}, iter([1, 2]))


def loops():
    own_list = []
    own_list.append(own_list)
    own_dict = {}
    own_dict["self"] = own_dict
    own_state = Plain()
    own_state.me = own_state
    return {"loop list": own_list, "loop dict": own_dict, "loop state": own_state}.items()


def python_pickler(value, protocol):
    out = io.BytesIO()
    pickle._Pickler(out, protocol).dump(value)
    return out.getvalue()


def record(*fields):
    print(*fields, sep="\t")


def record_opcodes(data):
    listing = " ".join(f"{at}:{op.name}" for op, _, at in pickletools.genops(data))
    record("opcodes", data.hex(), listing)


def record_value(name, value, text):
    for protocol in range(6):
        data = pickle.dumps(value, protocol)
        for variant in {data, pickletools.optimize(data), python_pickler(value, protocol)}:
            record("value", name, protocol, variant.hex(), text)
            record_opcodes(variant)


ARGUMENTS = {
    None: b"", "uint1": b"\1", "uint2": b"\1\0", "int4": b"\1\0\0\0", "uint4": b"\1\0\0\0", "float8": bytes(8),
    "long1": b"\1\7", "long4": b"\1\0\0\0\7", "string1": b"\1x", "string4": b"\1\0\0\0x", "bytes1": b"\1x",
    "bytes4": b"\1\0\0\0x", "bytes8": b"\1" + bytes(7) + b"x", "bytearray8": b"\1" + bytes(7) + b"x",
    "unicodestring1": b"\1x", "unicodestring4": b"\1\0\0\0x", "unicodestring8": b"\1" + bytes(7) + b"x",
    "decimalnl_short": b"1\n", "decimalnl_long": b"1L\n", "floatnl": b"1.5\n", "stringnl": b"'x'\n",
    "stringnl_noescape": b"x\n", "stringnl_noescape_pair": b"x\ny\n", "unicodestringnl": b"x\n", "uint8": bytes(8),
}


def every_opcode():
    data = b"\x80\x05"
    for op in pickletools.opcodes:
        if op.name not in ("PROTO", "STOP"):
            data += op.code.encode("latin1") + ARGUMENTS[op.arg and op.arg.name]
    return data + b"."


for name, value in values():
    record_value(name, value, show(value))
for value in unshown():
    try:
        record_value("unshown", value, "?")
    except (TypeError, pickle.PicklingError):
        pass  # Some protocols cannot write some of these.
for name, value in loops():
    record_value(name, value, "loop")
record_value("keyword arguments", Kwargs(size=3), "?")
record_opcodes(every_opcode())
for (module, name), moved in _compat_pickle.NAME_MAPPING.items():
    record("name", module, name, *moved)
for module, moved in _compat_pickle.IMPORT_MAPPING.items():
    record("name", module, "Anything", moved, "Anything")
