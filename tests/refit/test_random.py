"""Refits of random tables of slots, in every kind of file that can be made without a compiler."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import shutil
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import reweft
from make import ROW, zipped
from reweft import _core
from support import NO_CALL, storage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Tensors = dict[str, torch.Tensor]
# Of each row its elements in row-major order as bytes: the shape and the size of an element.
Values = list[torch.Tensor]

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.complex32, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
]  # fmt: skip
# Those that the other side of each format takes.
SAFETENSORS_DTYPES = [
    dtype
    for dtype in DTYPES
    if dtype not in {torch.complex128, torch.complex32, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2}
]
LEGACY_DTYPES = DTYPES[:12]
EXPORTED_DTYPES = [dtype for dtype in DTYPES if dtype != torch.float4_e2m1fn_x2]
# What `torch.export.save`, `torch.save` and the header of safetensors can hold as a name, and a string of C++.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
PLAIN = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters='"\\'),
    min_size=1,
    max_size=4,
)

deterministic = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# Said of every complex32 tensor; raised where the filter for torch's modules does not see it.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


class Row(NamedTuple):
    """One slot: `order` has the dimensions from the slowest to the one whose elements are neighbours."""

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]


def made(rows: list[Row], seed: int) -> Values:
    """Any bits; only those of bools are restricted."""
    values = []
    for i, row in enumerate(rows):
        shape = (*row.shape, row.dtype.itemsize)
        count = torch.Size(shape).numel()
        data = bytearray(random.Random(f"{seed} {i}").randbytes(count))  # noqa: S311  (no secret)
        bits = torch.frombuffer(data, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
        values.append((bits & 1 if row.dtype == torch.bool else bits).reshape(shape))
    return values


def laid(bits: torch.Tensor, dtype: torch.dtype, order: tuple[int, ...], *, stepped: bool = False) -> torch.Tensor:
    """A tensor with a storage of its own, dense in an order of dimensions, or with an element between each two."""
    held = bits.permute(*order, -1).clone(memory_format=torch.contiguous_format)
    if stepped:
        held = torch.stack([torch.zeros_like(held), held], dim=-2)
    view = held.view(dtype)[..., 1, 0] if stepped else held.view(dtype)[..., 0]
    return view.permute([order.index(dim) for dim in range(len(order))])


def content(tensor: torch.Tensor) -> bytes:
    """The bytes in row-major order, for dtypes too that torch has no copy for."""
    size = tensor.dtype.itemsize
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    strides = (*(stride * size for stride in tensor.stride()), 1)
    return storage.as_strided((*tensor.shape, size), strides, tensor.storage_offset() * size).numpy().tobytes()


def stored(row: Row, bits: torch.Tensor) -> bytes:
    """The bytes in the order in which the slot has them."""
    return bits.permute(*row.order, -1).contiguous().numpy().tobytes()


def strides(row: Row) -> tuple[int, ...]:
    found = [0] * len(row.shape)
    step = 1
    for dim in reversed(row.order):
        found[dim] = step
        step *= max(row.shape[dim], 1)
    return tuple(found)


def table(rows: list[Row], values: Values) -> Tensors:
    """Every row has a storage of its own."""
    tensors = [laid(bits, row.dtype, row.order) for row, bits in zip(rows, values, strict=True)]
    return {name: tensor for row, tensor in zip(rows, tensors, strict=True) for name in row.names}


def pooled(rows: list[Row], values: Values) -> Tensors:
    """Rows of a dtype are side by side in one storage, with two elements between them that no row has."""
    found: Tensors = {}
    for dtype in {row.dtype: None for row in rows}:
        pool, at = bytearray(2 * dtype.itemsize), []
        for row, bits in zip(rows, values, strict=True):
            if row.dtype == dtype:
                at.append((row, len(pool) // dtype.itemsize))
                pool += stored(row, bits) + bytes(2 * dtype.itemsize)
        storage = torch.frombuffer(pool, dtype=torch.uint8).view(dtype)
        views = {row: storage.as_strided(row.shape, strides(row), first) for row, first in at}
        found |= {name: view for row, view in views.items() for name in row.names}
    return {name: found[name] for row in rows for name in row.names}


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 64) * 64, b"\0")


MODEL = "net/data/aotinductor/model"
# The header of an ELF file of 64 bits without sections, so without weights.
LIBRARY = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, 0, 0, 64, 56, 0, 64, 0, 0)


def package_rows(rows: list[Row], values: Values) -> Iterator[str]:
    """What the wrapper's source states of each row, under its first name."""
    for i, (row, bits) in enumerate(zip(rows, values, strict=True)):
        shape, steps = (", ".join(map(str, numbers)) for numbers in (row.shape, strides(row)))
        dtype = str(row.dtype).removeprefix("torch.")
        text = ROW.format(i=i, name=f"w{i}", fqn=row.names[0], dtype=dtype, kind="Parameter", shape=shape, stride=steps)
        yield text.replace("data_size = 64", f"data_size = {len(padded(stored(row, bits)))}")


def package(rows: list[Row], values: Values, weights_records: dict[str, bytes]) -> bytes:
    """An AOTInductor package around an empty library."""
    records = {
        f"{MODEL}/abc.wrapper.cpp": "".join(package_rows(rows, values)).encode(),
        f"{MODEL}/abc.wrapper.so": LIBRARY,
        **weights_records,
        "net/archive_format": b"pt2",
        "net/archive_version": b"0",
        "net/.data/version": b"6\n",
        "net/byteorder": b"little",
    }
    return zipped(records)


def blob(rows: list[Row], values: Values) -> bytes:
    return b"".join(padded(stored(row, bits)) for row, bits in zip(rows, values, strict=True))


def write_package(rows: list[Row], values: Values, path: Path) -> None:
    """Weights beside the library; a manifest states ties."""
    bare = path.with_name("bare.pt2")
    bare.write_bytes(package(rows, values, {f"{MODEL}/abc.wrapper_weights.blob": blob(rows, values)}))
    tensors = [{"names": row.names, "persistent": True, "mutated": False, "used": True} for row in rows]
    origins = {"torch": torch.__version__, "device": "cpu", **NO_CALL, "tensors": tensors}
    _core.seal(bare, json.dumps(origins), path)


def check_package(path: Path, rows: list[Row], values: Values) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.read(f"{MODEL}/abc.wrapper_weights.blob") == blob(rows, values)


def untied(rows: list[Row], values: Values) -> tuple[list[Row], Values]:
    """A row for each name."""
    pairs = [(row._replace(names=(name,)), bits) for row, bits in zip(rows, values, strict=True) for name in row.names]
    return [row for row, _ in pairs], [bits for _, bits in pairs]


def write_pickled(rows: list[Row], values: Values, path: Path) -> None:
    """Weights as checkpoints beside the library, as `pickle_weights` has them; ties are names with one of these."""
    config: dict[str, object] = {}
    records: dict[str, bytes] = {}
    for i, (row, bits) in enumerate(zip(rows, values, strict=True)):
        buffer = io.BytesIO()
        torch.save(laid(bits, row.dtype, row.order), buffer)
        records[f"net/data/weights/weight_{i}"] = buffer.getvalue()
        config |= {name: (f"weight_{i}", row.shape, strides(row), 0) for name in row.names}
    records[f"{MODEL}/weights_config.json"] = json.dumps(config).encode()
    path.write_bytes(package(*untied(rows, values), records))


def check_pickled(path: Path, rows: list[Row], values: Values) -> None:
    with zipfile.ZipFile(path) as archive:
        for i, (row, bits) in enumerate(zip(rows, values, strict=True)):
            tensor = torch.load(io.BytesIO(archive.read(f"net/data/weights/weight_{i}")))
            assert content(tensor) == bits.numpy().tobytes(), row


class Nothing(nn.Module):
    """A program without weights: those of the table are put into its state_dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@functools.cache
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Nothing(), (torch.ones(1),))


def write_exported(rows: list[Row], values: Values, path: Path) -> None:
    exported = copy.copy(program())
    exported._state_dict = table(rows, values)
    torch.export.save(exported, path)


def check_tensors(found: Tensors, rows: list[Row], values: Values, *, tied: bool = True, strided: bool = True) -> None:
    """Every name has its bytes, dtype, shape and strides, and names of one row have one tensor's place."""
    assert set(found) == {name for row in rows for name in row.names}
    for row, bits in zip(rows, values, strict=True):
        for name in row.names:
            tensor = found[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (row.dtype, row.shape), name
            assert content(tensor) == bits.numpy().tobytes(), name
            assert not strided or tensor.stride() == strides(row), name
            if tied and tensor.numel():
                first = found[row.names[0]]
                assert storage_of(tensor) == storage_of(first), name
                assert tensor.storage_offset() == first.storage_offset(), name


@dataclass(frozen=True)
class Kind:
    """A format of artifacts: `write` makes one of a table, `check` holds what torch reads of it against one."""

    write: Callable[[list[Row], Values, Path], object]
    check: Callable[[Path, list[Row], Values], None]
    suffix: str
    names: st.SearchStrategy[str] = TEXT
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)
    tied: bool = True
    strided: bool = True
    zipped: bool = True


def check_saved(path: Path, rows: list[Row], values: Values) -> None:
    check_tensors(torch.load(path), rows, values)


def check_legacy(path: Path, rows: list[Row], values: Values) -> None:
    """Torch writes dtypes in the stream of 2018 that it does not read back, and reweft does."""
    if all(row.dtype in LEGACY_DTYPES for row in rows):
        check_saved(path, rows, values)


KINDS = {
    "zip": Kind(lambda rows, values, path: torch.save(table(rows, values), path), check_saved, ".pt"),
    "zip with shared storages": Kind(
        lambda rows, values, path: torch.save(pooled(rows, values), path), check_saved, ".pt"
    ),
    "legacy": Kind(
        lambda rows, values, path: torch.save(table(rows, values), path, _use_new_zipfile_serialization=False),
        check_legacy,
        ".pt",
        dtypes=tuple(LEGACY_DTYPES),
        zipped=False,
    ),
    "legacy with shared storages": Kind(
        lambda rows, values, path: torch.save(pooled(rows, values), path, _use_new_zipfile_serialization=False),
        check_legacy,
        ".pt",
        zipped=False,
    ),
    "safetensors": Kind(
        lambda rows, values, path: safetensors.torch.save_file(table(rows, values), path),
        lambda path, rows, values: check_tensors(safetensors.torch.load_file(path), rows, values),
        ".safetensors",
        dtypes=tuple(SAFETENSORS_DTYPES),
        tied=False,
        strided=False,
        zipped=False,
    ),
    "exported program": Kind(
        write_exported,
        lambda path, rows, values: check_tensors(torch.export.load(path).state_dict, rows, values),
        ".pt2",
        dtypes=tuple(EXPORTED_DTYPES),
    ),
    "package": Kind(write_package, check_package, ".pt2", names=PLAIN),
    "package with checkpoints": Kind(write_pickled, check_pickled, ".pt2", names=PLAIN),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

small = st.integers(1, 5)
shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 9)),
    st.tuples(small, small),
    st.tuples(small, small, small),
    st.tuples(small, small, small, small),
    st.sampled_from([(3, 0), (0, 2, 2), (4096,), (129, 65), (1, 3, 1, 1)]),
)


@st.composite
def orders(draw: st.DrawFn, rank: int) -> tuple[int, ...]:
    """Row-major, the last two dimensions transposed, channels last, or any."""
    plain = tuple(range(rank))
    choices = [st.just(plain), st.permutations(plain).map(tuple)]
    if rank > 1:
        choices.append(st.just((*plain[:-2], rank - 1, rank - 2)))
    if rank == 4:
        choices.append(st.just((0, 2, 3, 1)))
    return draw(st.one_of(choices))


@st.composite
def tables(draw: st.DrawFn, kind: Kind) -> list[Row]:
    """Rows of a model's slots; a name is tied to one before it, or has a row of its own."""
    rows: list[Row] = []
    name = st.lists(kind.names, min_size=1, max_size=3).map(".".join)
    for key in draw(st.lists(name, min_size=1, max_size=6, unique=True)):
        if rows and kind.tied and draw(st.integers(0, 3)) == 0:
            number = draw(st.integers(0, len(rows) - 1))
            rows[number] = rows[number]._replace(names=(*rows[number].names, key))
            continue
        shape = draw(shapes)
        order = draw(orders(len(shape))) if kind.strided else tuple(range(len(shape)))
        rows.append(Row((key,), draw(st.sampled_from(kind.dtypes)), shape, order))
    return rows


@dataclass(frozen=True)
class Weights:
    """How a checkpoint holds the values of some rows; its layout is its own."""

    form: str
    rows: list[Row]
    stepped: list[bool]
    tied: list[bool]
    order: list[int]

    def write(self, values: Values, path: Path) -> Path:
        """Make the file; `values` are those of the rows here."""
        pairs: list[tuple[str, torch.Tensor]] = []
        for row, bits, stepped, tied in zip(self.rows, values, self.stepped, self.tied, strict=True):
            tensor = laid(bits, row.dtype, row.order, stepped=stepped)
            held = (tensor if tied else laid(bits, row.dtype, row.order, stepped=stepped) for _ in row.names)
            pairs.extend(zip(row.names, held, strict=True))
        named = dict(pairs[i] for i in self.order)
        if self.form == "safetensors":
            safetensors.torch.save_file(named, path)
        else:
            torch.save(named, path, _use_new_zipfile_serialization=self.form == "zip")
        return path


@st.composite
def weights(draw: st.DrawFn, rows: list[Row]) -> Weights:
    """A checkpoint for these rows: any format, layouts and order of keys, with at least one of the names of each."""
    flat = all(row.dtype in SAFETENSORS_DTYPES for row in rows) and draw(st.booleans())
    here = []
    for row in rows:
        names = draw(st.permutations(row.names))[: draw(st.integers(1, len(row.names)))]
        rank = len(row.shape)
        here.append(row._replace(names=tuple(names), order=tuple(range(rank)) if flat else draw(orders(rank))))
    flags = st.lists(st.booleans() if not flat else st.just(value=False), min_size=len(rows), max_size=len(rows))
    form = "safetensors" if flat else draw(st.sampled_from(["zip", "legacy"]))
    keys = range(sum(len(row.names) for row in here))
    return Weights(form, here, draw(flags), draw(flags), draw(st.permutations(keys)))


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[], Path]:
    """A new folder for every example."""
    return lambda: Path(tempfile.mkdtemp(dir=tmp_path))


def copied(path: Path, name: str) -> Path:
    return Path(shutil.copyfile(path, path.with_name(name + path.suffix)))


def assert_clean(folder: Path) -> None:
    assert not [path.name for path in folder.iterdir() if ".reweft-" in path.name]


@every_kind
@deterministic
@given(data=st.data())
def test_bytes_depend_on_the_last_weights_alone(kind: Kind, folders: Callable[[], Path], data: st.DataObject) -> None:
    rows, folder = data.draw(tables(kind)), folders()
    artifact, first = folder / f"a{kind.suffix}", made(rows, 0)
    kind.write(rows, first, artifact)
    before = artifact.read_bytes()
    x, y, old = (
        data.draw(weights(rows)).write(values, folder / name)
        for name, values in [("x", made(rows, 1)), ("y", made(rows, 2)), ("old", first)]
    )
    with_x, with_xy, with_y, back = (folder / f"{name}{kind.suffix}" for name in ["ax", "axy", "ay", "back"])
    reweft.refit(artifact, x, out=with_x)
    reweft.refit(with_x, y, out=with_xy)
    reweft.refit(artifact, y, out=with_y)
    assert with_xy.read_bytes() == with_y.read_bytes()
    reweft.refit(with_xy, old, out=back)
    assert back.read_bytes() == before == artifact.read_bytes()
    here = copied(artifact, "here")
    for given_weights, wanted in [(x, with_x), (y, with_y), (old, artifact), (old, artifact)]:
        reweft.refit(here, given_weights, in_place=True)
        assert here.read_bytes() == wanted.read_bytes()
    assert_clean(folder)


@every_kind
@deterministic
@given(data=st.data())
def test_refit_of_the_stripped_is_refit_of_the_whole(
    kind: Kind, folders: Callable[[], Path], data: st.DataObject
) -> None:
    rows, folder = data.draw(tables(kind)), folders()
    assume(any(0 not in row.shape for row in rows))
    artifact, stripped = folder / f"a{kind.suffix}", folder / "stripped"
    kind.write(rows, made(rows, 0), artifact)
    report = reweft.strip(artifact, stripped)
    assert report.slots == sum(0 not in row.shape for row in rows)
    x = data.draw(weights(rows)).write(made(rows, 1), folder / "x")
    whole, filled = folder / f"b{kind.suffix}", folder / f"c{kind.suffix}"
    reweft.refit(artifact, x, out=whole)
    reweft.refit(stripped, x, out=filled)
    assert filled.read_bytes() == whole.read_bytes()
    assert_clean(folder)


@every_kind
@deterministic
@given(data=st.data())
def test_only_slots_that_have_keys_change(kind: Kind, folders: Callable[[], Path], data: st.DataObject) -> None:
    rows, folder = data.draw(tables(kind)), folders()
    artifact, present = folder / f"a{kind.suffix}", made(rows, 0)
    kind.write(rows, present, artifact)
    before = artifact.read_bytes()
    old = data.draw(weights(rows)).write(present, folder / "old")
    for seed in range(1, data.draw(st.integers(2, 4))):
        chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
        values = made(rows, seed)
        given_weights = data.draw(weights([rows[i] for i in chosen]))
        x = given_weights.write([values[i] for i in chosen], folder / f"x{seed}")
        here = copied(artifact, "here")
        reports = [
            reweft.refit(artifact, x, out=artifact, allow_missing=True),
            reweft.refit(here, x, in_place=True, allow_missing=True),
        ]
        assert here.read_bytes() == artifact.read_bytes()
        mix = [values[i] if i in chosen else bits for i, bits in enumerate(present)]
        changed = sum(not torch.equal(*pair) for pair in zip(mix, present, strict=True))
        for report in reports:
            assert (report.slots, report.slots_changed) == (len(chosen), changed)
            assert len(report.kept) == len(rows) - len(chosen)
            assert all(any(name in row.names for name in report.kept) for row in rows if rows.index(row) not in chosen)
        present = mix
        reweft.extract(artifact, folder / "mix.pt")
        check_tensors(torch.load(folder / "mix.pt"), rows, present)
    reweft.refit(artifact, old, in_place=True)
    assert artifact.read_bytes() == before
    assert_clean(folder)


@every_kind
@deterministic
@given(data=st.data())
def test_what_is_read_back_is_what_was_put_in(kind: Kind, folders: Callable[[], Path], data: st.DataObject) -> None:
    rows, folder = data.draw(tables(kind)), folders()
    artifact, values = folder / f"a{kind.suffix}", made(rows, 1)
    kind.write(rows, made(rows, 0), artifact)
    kind.check(artifact, rows, made(rows, 0))
    form = data.draw(weights(rows))
    x, out = form.write(values, folder / "x"), folder / f"b{kind.suffix}"
    reweft.refit(artifact, x, out=out)
    assert reweft.verify(out, x).equal
    kind.check(out, rows, values)
    reweft.extract(out, folder / "out.pt")
    check_tensors(torch.load(folder / "out.pt"), rows, values)
    if all(row.dtype in SAFETENSORS_DTYPES for row in rows):
        reweft.extract(out, folder / "out.safetensors", shared="duplicate")
        found = safetensors.torch.load_file(folder / "out.safetensors")
        check_tensors(found, rows, values, tied=False, strided=False)
    if kind.zipped:
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None
    assert_clean(folder)


@every_kind
@deterministic
@given(data=st.data())
def test_one_flipped_byte_is_found(kind: Kind, folders: Callable[[], Path], data: st.DataObject) -> None:
    rows, folder = data.draw(tables(kind)), folders()
    values, flipped = made(rows, 1), made(rows, 1)
    held = [i for i, bits in enumerate(values) if bits.numel()]
    assume(held)
    number = data.draw(st.sampled_from(held))
    flipped[number].view(-1)[data.draw(st.integers(0, values[number].numel() - 1))] ^= 1
    form = data.draw(weights(rows))
    x, other = form.write(values, folder / "x"), form.write(flipped, folder / "other")
    artifact, out = folder / f"a{kind.suffix}", folder / f"b{kind.suffix}"
    kind.write(rows, values, artifact)
    assert reweft.verify(artifact, x).equal
    report = reweft.refit(artifact, other, out=out)
    assert report.slots_changed == 1
    for file, checkpoint in [(artifact, other), (out, x)]:
        found = reweft.verify(file, checkpoint)
        assert not found.equal
        assert [finding.slot in rows[number].names for finding in found.differences] == [True]
    assert reweft.verify(out, other).equal
