"""Generated files against `torch.load`: whatever both accept is the same, whole or mutated."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

import reweft
from support import raw

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
    torch.uint32, torch.uint64,
]  # fmt: skip
# Dtypes that the stream of 2018 has a storage class for.
OLD_DTYPES = DTYPES[:10]
FORMATS = ("zip", "zip without CRC", "legacy")

Tensors = dict[str, torch.Tensor]


def base(dtype: torch.dtype, numel: int, seed: int) -> torch.Tensor:
    """Any bits; only those of bools are restricted."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


@st.composite
def views(draw: st.DrawFn, of: torch.Tensor) -> torch.Tensor:
    """A view of a base: reshaped, transposed, cut, stepped, repeated, or without elements."""
    rows = draw(st.sampled_from([1, 2, 3, 4, 6]))
    view = of.reshape(rows, -1)
    if draw(st.booleans()):
        view = view.t()
    for dim in range(2):
        start = draw(st.integers(0, view.shape[dim]))
        view = view.narrow(dim, start, draw(st.integers(0, view.shape[dim] - start)))
    step = draw(st.sampled_from([1, 1, 2, 3]))
    view = view[::step]
    kind = draw(st.sampled_from(["plain", "expand", "scalar", "unsqueeze", "parameter"]))
    if kind == "expand":
        return view.unsqueeze(1).expand(view.shape[0], draw(st.integers(0, 3)), view.shape[1])
    if kind == "scalar" and view.numel():
        return view[0, 0]
    if kind == "unsqueeze":
        return view.unsqueeze(draw(st.integers(0, 2)))
    if kind == "parameter":
        return torch.nn.Parameter(view, requires_grad=False)
    return view


@st.composite
def states(draw: st.DrawFn, dtypes: list[torch.dtype]) -> dict[Any, Any]:
    """Nested dicts, lists and tuples of views, some of which share a storage, with other values between."""
    bases = [base(draw(st.sampled_from(dtypes)), 24, seed) for seed in range(draw(st.integers(1, 3)))]
    tensors = st.sampled_from(bases).flatmap(views)
    other = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    keys = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=4).filter(
        lambda key: "." not in key
    )
    leaves = tensors | tensors | other
    inner = st.recursive(
        leaves,
        lambda values: (
            st.lists(values, max_size=3)
            | st.lists(values, max_size=3).map(tuple)
            | st.dictionaries(keys, values, max_size=3)
        ),
        max_leaves=8,
    )
    return draw(st.dictionaries(keys, inner, min_size=1, max_size=4))


def saved(value: object, form: str) -> bytes:
    buffer = io.BytesIO()
    with config.patch({"save.compute_crc32": form != "zip without CRC"}):  # type: ignore[attr-defined]
        torch.save(value, buffer, _use_new_zipfile_serialization=form != "legacy")
    return buffer.getvalue()


def flat(value: Any, path: str = "") -> Tensors:
    """Tensors by dotted path, as reweft names them."""
    if isinstance(value, torch.Tensor):
        return {path or "tensor": value}
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))
    else:
        return {}
    found: Tensors = {}
    for key, item in pairs:
        found |= flat(item, f"{path}.{key}" if path else str(key))
    return found


def assert_agrees(checkpoint: reweft.Checkpoint, wanted: Tensors) -> None:
    assert list(checkpoint) == list(wanted)
    assert not checkpoint.unreadable
    storages: dict[int, int] = {}
    for key, tensor in wanted.items():
        info = checkpoint[key]
        assert f"torch.{info.dtype}" == str(tensor.dtype), key
        assert info.shape == tuple(tensor.shape), key
        assert info.strides == tensor.stride(), key
        assert info.storage_offset == tensor.storage_offset(), key
        assert bytes(info.read()) == raw(tensor), key
        if tensor.untyped_storage().nbytes():
            shared = storages.setdefault(tensor.untyped_storage().data_ptr(), info.storage)
            assert shared == info.storage, key
    assert len(set(storages.values())) == len(storages)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_torch_saves_is_read_as_torch_loads_it(form: str, data: st.DataObject) -> None:
    state = data.draw(states(OLD_DTYPES if form == "legacy" else DTYPES))
    content = saved(state, form)
    wanted = flat(torch.load(io.BytesIO(content), weights_only=True))
    assert_agrees(reweft.open(content), wanted)


def small_state() -> dict[str, Any]:
    w = torch.arange(12.0).reshape(3, 4)
    return {"w": w, "t": w.t(), "b": torch.arange(5), "n": {"h": torch.ones(2, dtype=torch.float16), "l": [w[1:], 3]}}


def mutate(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data))
        match dice.randrange(4):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at] = dice.randrange(256)
            case 2:
                del data[at : at + dice.randrange(1, 4)]
            case _:
                data[at:at] = dice.randbytes(dice.randrange(1, 4))
    return bytes(data)


def loaded(content: bytes) -> Tensors | None:
    """What torch makes of it; None if it refuses."""
    try:
        return flat(torch.load(io.BytesIO(content), weights_only=True))
    except Exception:  # noqa: BLE001  (torch raises whatever its parts raise)
        return None


def opened(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        checkpoint = reweft.open(content)
        return {key: (info.dtype, info.shape, bytes(info.read())) for key, info in checkpoint.items()}
    except (reweft.FormatError, reweft.UnsupportedError, reweft.LimitError, reweft.KeyCollisionError):
        return None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore")  # torch warns of what it finds in such files
def test_mutated_files_that_both_accept_hold_the_same(form: str) -> None:
    """torch compares no CRC, so it accepts damage that reweft refuses; where both accept, they agree."""
    content, dice = saved(small_state(), form), random.Random(0)  # noqa: S311
    both = 0
    for _ in range(3_000):
        data = mutate(content, dice)
        ours = opened(data)
        if ours is None:
            continue
        theirs = loaded(data)
        if theirs is None:
            continue
        both += 1
        assert list(ours) == list(theirs)
        for key, tensor in theirs.items():
            assert ours[key] == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw(tensor)), key
    assert both > 50


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_cut_is_refused(form: str) -> None:
    content = saved(small_state(), form)
    assert [nbytes for nbytes in range(len(content)) if opened(content[:nbytes]) is not None] == []
