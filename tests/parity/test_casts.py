"""Casts between float dtypes, held against torch's `Tensor.to`, bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import reweft
from reweft import _core

FLOATS = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu",
]  # fmt: skip
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# Lower halves that decide roundings: nothing, the least, just below, at and just above a tie, all ones.
LOWER_16 = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x5555, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
LOWER_48 = [
    0,
    1,
    0x123456789ABC,
    *(base + step for base in (1 << 28, 1 << 29, 3 << 28, 1 << 47) for step in (-1, 0, 1)),
]
PAIRS = [pair for pair in itertools.product(FLOATS, FLOATS) if pair[0] != pair[1]]


def dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def inputs(name: str) -> torch.Tensor:
    """All inputs of up to 16 bits; of the wider ones all upper halves with telling lower ones, and noise.

    A multiple of 64 elements, so that torch's vector loop meets each of them.
    """
    size = dtype(name).itemsize
    if size <= 2:
        bits = torch.arange(1 << (8 * size))
    else:
        shift, lower = (16, LOWER_16) if size == 4 else (48, LOWER_48)
        upper = torch.arange(1 << 16) << shift
        noise = torch.randint(-(1 << 63), (1 << 63) - 1, (1 << 20,), generator=torch.Generator().manual_seed(0))
        # Of all float64, few have an exponent that other dtypes have: these get one.
        near = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e3
        tiny = near * 10.0 ** -torch.arange(1 << 20).remainder(12)
        small = torch.cat([near, tiny]).to(dtype(name)).view(INTEGERS[size]).long()
        bits = torch.cat([*(upper | low for low in lower), noise, small])
    return bits.to(INTEGERS[size]).view(dtype(name))


def cast(tensor: torch.Tensor, source: str, target: str) -> torch.Tensor:
    raw = tensor.view(torch.uint8).numpy()
    out = np.frombuffer(memoryview(_core.cast(raw, source, target)), np.uint8).copy()
    return torch.from_numpy(out).view(INTEGERS[dtype(target).itemsize])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_cast_gives_the_bits_that_torch_gives(source: str, target: str) -> None:
    values = inputs(source)
    assert len(values) % 64 == 0
    ours, theirs = cast(values, source, target), values.to(dtype(target)).view(INTEGERS[dtype(target).itemsize])
    differ = (ours != theirs).nonzero().flatten().tolist()
    lines = [(hex(values.view(INTEGERS[values.itemsize])[at]), hex(ours[at]), hex(theirs[at])) for at in differ[:8]]
    assert not differ, f"{len(differ)} of {len(values)} differ (input, ours, torch's): {lines}"


# torch has a loop over vectors and one over what is left. They agree on every number; only NaN bits differ, only here.
NAN_BITS_DEPEND_ON_THE_LOOP = {("float32", "bfloat16"), ("float64", "bfloat16"), ("float16", "float32")}


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_torchs_other_loops_agree_but_for_the_bits_of_nan(source: str, target: str) -> None:
    values = inputs(source)
    strided = torch.stack([values, values], 1)[:, 0].to(dtype(target))
    few = torch.cat([values[at : at + 1].to(dtype(target)) for at in range(0, len(values), len(values) // 250)])
    ours = cast(values, source, target)
    for theirs, held in ((strided, ours), (few, ours[:: len(values) // 250])):
        differ = theirs.view(held.dtype) != held
        assert not differ.any() or (source, target) in NAN_BITS_DEPEND_ON_THE_LOOP
        assert theirs[differ].isnan().all()


@pytest.mark.parametrize("name", FLOATS)
def test_a_cast_to_the_same_dtype_keeps_every_bit(name: str) -> None:
    values = inputs(name)
    assert torch.equal(cast(values, name, name), values.view(INTEGERS[values.itemsize]))


def test_what_has_no_cast_is_refused_by_name() -> None:
    for source, target in (
        ("float32", "int32"),
        ("bool", "float16"),
        ("complex64", "float32"),
        ("float4_e2m1fn_x2", "float32"),
    ):
        with pytest.raises(reweft.UnsupportedError, match=f"{source} to {target}"):
            _core.cast(np.zeros(8, np.uint8), source, target)
    with pytest.raises(reweft.FormatError, match="3 bytes"):
        _core.cast(np.zeros(3, np.uint8), "float32", "float16")
