"""Headers of safetensors that two readers could understand in two ways, or that cost more than they say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from safetensors import SafetensorError
from safetensors.torch import load

import reweft
from support import assert_says

if TYPE_CHECKING:
    from pathlib import Path


def blob(header: str | bytes, data: bytes = b"x", *, nbytes: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else header.encode()
    return (len(content) if nbytes is None else nbytes).to_bytes(8, "little") + content + data


def row(dtype: str = '"U8"', shape: str = "[1]", offsets: str = "[0,1]") -> str:
    return f'"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


def rows(*offsets: tuple[int, int]) -> str:
    """A tensor of bytes for each pair."""
    tensors = {
        str(at): {"dtype": "U8", "shape": [max(end - start, 0)], "data_offsets": [start, end]}
        for at, (start, end) in enumerate(offsets)
    }
    return json.dumps(tensors)


LENGTHS: dict[str, tuple[bytes, type[reweft.ReweftError]]] = {
    "no header": (blob("", b""), reweft.FormatError),
    "header of no bytes": (blob("{}", b"", nbytes=0), reweft.FormatError),
    "longer than the file": (blob("{}", b"", nbytes=100), reweft.FormatError),
    "longer than the limit": (blob("{}", b"", nbytes=100_000_001), reweft.LimitError),
    "as long as numbers go": (blob("{}", b"", nbytes=2**64 - 1), reweft.LimitError),
    "ends in the length": (blob("{}", b"")[:7], reweft.UnsupportedError),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_length_of_the_header(name: str, tmp_path: Path) -> None:
    content, kind = LENGTHS[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(kind) as error:
            reweft.open(tmp_path / "x.safetensors", mmap=mmap)
        assert_says(error, tmp_path / "x.safetensors")
    with pytest.raises(SafetensorError):
        load(content)


@pytest.mark.parametrize("before", [" ", "\n", "\t", "\ufeff", "\0"])
def test_header_begins_with_a_brace(before: str) -> None:
    """The specification says so; the reference takes white space before it all the same."""
    with pytest.raises((reweft.FormatError, reweft.UnsupportedError)):
        reweft.open(blob(before + "{" + row() + "}"))


@pytest.mark.parametrize("behind", [" ", "       ", "\n", "\t\r"])
def test_white_space_pads_the_header(behind: str) -> None:
    content = blob("{" + row() + "}" + behind)
    assert bytes(reweft.open(content)["a"].read()) == b"x"
    assert load(content)["a"].tolist() == [ord("x")]


BAD_ROWS = {
    "zero byte behind": "{" + row() + "}\0",
    "second object": "{" + row() + "}{}",
    "comment": "{" + row() + "/* */}",
    "comma at the end": "{" + row() + ",}",
    "float size": "{" + row(shape="[1.0]") + "}",
    "size with an exponent": "{" + row(shape="[1e0]") + "}",
    "negative size": "{" + row(shape="[-1]") + "}",
    "negative zero": "{" + row(offsets="[-0,1]") + "}",
    "size of 2^64": "{" + row(shape="[18446744073709551616]") + "}",
    "size that is text": "{" + row(shape='["1"]') + "}",
    "size that is a bool": "{" + row(shape="[true]") + "}",
    "size with a zero before": "{" + row(shape="[01]") + "}",
    "shape that is a number": "{" + row(shape="1") + "}",
    "sizes that overflow": "{" + row(shape="[4294967296,4294967296]") + "}",
    "float offset": "{" + row(offsets="[0,1.0]") + "}",
    "offset with an exponent": "{" + row(offsets="[0,1e0]") + "}",
    "one offset": "{" + row(offsets="[0]") + "}",
    "three offsets": "{" + row(offsets="[0,1,1]") + "}",
    "offsets the wrong way": "{" + row(offsets="[1,0]") + "}",
    "offset of 2^64": "{" + row(offsets="[0,18446744073709551616]") + "}",
    "dtype of small letters": "{" + row(dtype='"u8"') + "}",
    "dtype that is null": "{" + row(dtype="null") + "}",
    "no offsets": '{"a":{"dtype":"U8","shape":[1]}}',
    "key twice": "{" + row() + "," + row() + "}",
    "key twice, once with an escape": "{" + row() + "," + row().replace('"a"', '"\\u0061"') + "}",
    "metadata twice, once with an escape": '{"__metadata__":{},"__metadat\\u0061__":{},' + row() + "}",
    "metadata that is null": '{"__metadata__":null,' + row() + "}",
    "metadata that is a list": '{"__metadata__":[],' + row() + "}",
    "metadata with a number": '{"__metadata__":{"step":1},' + row() + "}",
    "key of half a surrogate pair": "{" + row().replace('"a"', '"\\ud800"') + "}",
    "three elements of six bits": "{" + row('"F6_E2M3"', "[3]", "[0,3]") + "}",
    "data that is a byte short": rows((0, 2)),
    "data that is a byte long": rows((0, 0)),
    "hole of nothing": rows((0, 1), (2, 2)),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_header_that_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob(BAD_ROWS[name]))
    for mmap in (False, True):
        with pytest.raises((reweft.FormatError, reweft.UnsupportedError)) as error:
            reweft.open(path, mmap=mmap)
        assert_says(error, path)


@pytest.mark.parametrize("order", [((0, 0), (0, 0), (0, 1)), ((1, 1), (0, 1), (0, 0)), ((0, 1), (1, 1), (1, 1))])
def test_tensors_of_no_bytes_share_a_place(order: tuple[tuple[int, int], ...]) -> None:
    content = blob(rows(*order))
    checkpoint = reweft.open(content)
    wanted = {key: value.numpy().tobytes() for key, value in load(content).items()}
    assert {key: bytes(info.read()) for key, info in checkpoint.items()} == wanted


def test_tensor_of_more_dimensions_than_torch_has(tmp_path: Path) -> None:
    content = blob("{" + row(shape=json.dumps([1] * 64)) + "}")
    assert bytes(reweft.open(content)["a"].read()) == b"x"
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob("{" + row(shape=json.dumps([1] * 65)) + "}"))
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert_says(error, path, '"a"', "at most 64")


@pytest.mark.parametrize("header", ['{"a":["U8",[1],[0,1]]}', '{"a":["U8",[1],[0,1]],"__metadata__":{}}'])
def test_row_that_is_a_list(header: str) -> None:
    """The reference takes it as well; the specification and other readers know objects alone."""
    with pytest.raises(reweft.FormatError):
        reweft.open(blob(header))
