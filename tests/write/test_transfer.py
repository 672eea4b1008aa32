"""How bytes move: every layout through every path, all CRCs, the kernel where it can, bounded memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reweft
from reweft import _core
from support import assert_says, flip, leftovers, raw, record_at, save, without_crc

if TYPE_CHECKING:
    from collections.abc import Callable

BINARY = Path(__file__).parents[2] / "target/release/reweft"
# Around the sizes at which a record goes another way, and an odd one.
SIZES = [1, 1000, (128 << 10) - 4, 128 << 10, (128 << 10) + 4, (3 << 20) + 12]


def zoo() -> dict[str, torch.Tensor]:
    """Small and large tensors of every layout, their dtypes interleaved so that neighbours do not stay neighbours."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for number, nbytes in enumerate(SIZES):
        flat = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        state[f"{number}.bytes"] = flat
        state[f"{number}.count"] = torch.tensor(number)
        if nbytes % 4 == 0:
            state[f"{number}.half"] = flat.clone().view(torch.int16)
            state[f"{number}.tail"] = flat.clone()[nbytes // 3 :]
            state[f"{number}.even"] = flat.clone()[::2]
            state[f"{number}.square"] = flat.clone().view(2, -1).t()
            state[f"{number}.repeated"] = flat.clone()[:100].view(100, 1).expand(100, 70)
            state[f"{number}.empty"] = flat.clone()[:0]
    image = torch.randn(3, 5, 40, 50, generator=generator)
    state["channels_last"] = image.contiguous(memory_format=torch.channels_last)
    base = torch.randn(4, 300, 400, generator=generator)
    state["shared.all"] = base
    state["shared.part"] = base[1:3, :, 7:300]
    state["shared.permuted"] = base.permute(2, 0, 1)
    return state


def assert_converted(path: Path, out: Path, wanted: dict[str, torch.Tensor]) -> None:
    reweft.convert(path, out, shared="duplicate")
    loaded = load_file(out)
    assert list(reweft.open(out)) == list(wanted)
    for key, value in wanted.items():
        assert (loaded[key].dtype, loaded[key].shape) == (value.dtype, value.shape), key
        assert raw(loaded[key]) == raw(value), key


@pytest.mark.parametrize("mmap", [False, True])
def test_every_layout_and_size_arrives(mmap: bool, tmp_path: Path) -> None:  # noqa: FBT001
    state = zoo()
    path = save(state, tmp_path / "x.pt")
    assert_converted(path, tmp_path / "x.safetensors", state)
    reweft.convert(reweft.open(path, mmap=mmap), tmp_path / "y.safetensors", shared="duplicate")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def rezipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, data)


def other_byte_order(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, b"big" if name.endswith("/byteorder") else data)


def test_records_without_a_crc(tmp_path: Path) -> None:
    state = zoo()
    assert_converted(without_crc(state, tmp_path / "x.pt"), tmp_path / "x.safetensors", state)


def test_compressed_records(tmp_path: Path) -> None:
    state = zoo()
    rezipped(save(state, tmp_path / "x.pt"))
    assert_converted(tmp_path / "x.pt", tmp_path / "x.safetensors", state)


def test_the_old_stream(tmp_path: Path) -> None:
    state = zoo()
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert_converted(tmp_path / "x.pt", tmp_path / "x.safetensors", state)


def test_the_other_byte_order(tmp_path: Path) -> None:
    state = {key: value for key, value in zoo().items() if value.element_size() > 1}
    other_byte_order(save(state, tmp_path / "x.pt"))
    assert_converted(tmp_path / "x.pt", tmp_path / "x.safetensors", torch.load(tmp_path / "x.pt"))


def test_safetensors_in_any_order(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in zoo().items()}
    state = {key: value.clone() for key, value in reversed(state.items())}
    save_file(state, tmp_path / "x.safetensors")
    keys = reweft.KeyMap([(r"^(\d)\.", "n$1.")])
    reweft.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", keys=keys)
    loaded = load_file(tmp_path / "y.safetensors")
    renamed = {re.sub(r"^(\d)\.", r"n\1.", key): value for key, value in state.items()}
    assert loaded.keys() == renamed.keys()
    assert all(raw(loaded[key]) == raw(value) for key, value in renamed.items())


def test_large_strided_tensors_in_slabs(tmp_path: Path) -> None:
    base = torch.arange(5 * (1 << 20), dtype=torch.int32).view(5, 1 << 20)
    state = {"gap": base[:, 5:], "every_other": base[::2, ::2], "transposed": base.t(), "rows": base.flip(0)[1:, 1:]}
    assert_converted(save(state, tmp_path / "x.pt"), tmp_path / "x.safetensors", state)


def test_tensors_that_are_made_when_they_are_read(tmp_path: Path) -> None:
    large, small = torch.randn(3 << 20), torch.randn(5, 4)
    path = save({"large": large, "small": small.t(), "a": large[:9], "b": large[9:14]}, tmp_path / "x.pt")
    rules: list[dict[str, Any]] = [
        {"match": "^(large|small)$", "cast": "bfloat16"},
        {"concat": ["^a$", "^b$"], "into": "joined"},
    ]
    wanted = {"large": large.bfloat16(), "small": small.t().bfloat16(), "joined": large[:14]}
    reweft.convert(path, tmp_path / "x.safetensors", keys=reweft.KeyMap(rules), shared="duplicate")
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == wanted.keys()
    assert all(raw(loaded[key]) == raw(value) for key, value in wanted.items())


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda flat: flat,
    "part": lambda flat: flat[: len(flat) // 2],
    "strided": lambda flat: flat[: len(flat) // 2 : 2],
}


@pytest.mark.parametrize("nbytes", SIZES[1:])
@pytest.mark.parametrize("view", VIEWS)
def test_a_record_is_checked_whatever_is_taken_of_it(view: str, nbytes: int, tmp_path: Path) -> None:
    flat = torch.zeros(nbytes, dtype=torch.uint8)
    path = save({"ok": torch.ones(3), "w": VIEWS[view](flat)}, tmp_path / "x.pt")
    start, size = record_at(path, "data/1")
    assert size == nbytes
    flip(path, start + nbytes - 1)  # behind what the views show
    with pytest.raises(reweft.FormatError) as error:
        reweft.convert(path, tmp_path / "x.safetensors")
    assert_says(error, path, '"w"', "x/data/1", "CRC")
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("key", ["dropped", "kept"])
def test_only_what_is_used_is_checked(key: str, tmp_path: Path) -> None:
    path = save({"dropped": torch.ones(9), "kept": torch.ones(9)}, tmp_path / "x.pt")
    flip(path, record_at(path, "data/0")[0])
    keys = reweft.KeyMap(select=[key])
    if key == "kept":
        reweft.convert(path, tmp_path / "x.safetensors", keys=keys)
        assert torch.equal(load_file(tmp_path / "x.safetensors")["kept"], torch.ones(9))
    else:
        with pytest.raises(reweft.FormatError, match="CRC"):
            reweft.convert(path, tmp_path / "x.safetensors", keys=keys)


def test_a_local_header_that_lies_is_found_in_small_and_large_records(tmp_path: Path) -> None:
    for nbytes in (100, 1 << 20):
        path = save({"w": torch.zeros(nbytes, dtype=torch.uint8)}, tmp_path / "x.pt")
        with zipfile.ZipFile(path) as archive:
            header = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data/0"))
        flip(path, header + 30 + len("x/data/"))
        with pytest.raises(reweft.FormatError, match="local header and directory differ in name"):
            reweft.convert(path, tmp_path / "x.safetensors")


def test_tensors_in_memory(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in zoo().items()}
    checkpoint = _core.Checkpoint.from_tensors("memory", list(state), list(state.values()))
    _core.convert(checkpoint, tmp_path / "x.safetensors", target=None, shared="error", max_shard=None, sync=False)
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(raw(loaded[key]) == raw(value) for key, value in state.items())


def run(*args: object, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and stderr of the command."""
    line = [*prefix, str(BINARY), *map(str, args)]
    done = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("layout", ["plain", "gap"])
def test_memory_does_not_grow_with_the_model(layout: str, tmp_path: Path) -> None:
    large = torch.ones(200 << 20, dtype=torch.uint8)
    value = large.view(200, -1)[:, :-1] if layout == "gap" else large
    path = save({"large": value, **{str(number): torch.ones(100) for number in range(300)}}, tmp_path / "x.pt")
    # The limit is on anonymous memory: 48 MiB, in KiB.
    limited = ("sh", "-c", 'ulimit -d 49152 && exec "$0" "$@"')
    code, text = run("convert", path, tmp_path / "x.safetensors", "--no-sync", prefix=limited)
    assert code == 0, text
    assert raw(load_file(tmp_path / "x.safetensors")["large"][:1]) == raw(value[:1])


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def traced(log: Path, *options: str) -> tuple[str, ...]:
    calls = "read,readv,pread64,preadv,write,writev,pwrite64,pwritev,copy_file_range"
    return ("strace", "-f", "-o", str(log), "-e", f"trace={calls}", *options)


@needs_strace
def test_the_kernel_moves_the_payload_of_safetensors(tmp_path: Path) -> None:
    state = {f"{number}.{kind}": torch.randn(size) for number in range(50) for kind, size in (("w", 99999), ("b", 7))}
    save_file(state, tmp_path / "x.safetensors")
    log = tmp_path / "log"
    args = ("convert", tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--remap", "^=net.", "--no-sync")
    code, text = run(*args, prefix=traced(log))
    assert code == 0, text
    moved = {"kernel": 0, "user": 0}
    for call, count in re.findall(r"(\w+)\(.*= (\d+)$", log.read_text(), re.MULTILINE):
        moved["kernel" if call == "copy_file_range" else "user"] += int(count)
    assert moved["kernel"] == sum(value.nbytes for value in state.values())
    assert moved["user"] < 200_000
    assert log.read_text().count("copy_file_range(") == 1, "neighbours are copied at once"


@needs_strace
@pytest.mark.parametrize("name", ["y.safetensors", "y.pt"])
def test_small_records_take_few_system_calls(name: str, tmp_path: Path) -> None:
    path = save({f"layer.{number}.weight": torch.randn(16, 16) for number in range(5000)}, tmp_path / "x.pt")
    log = tmp_path / "log"
    code, text = run("convert", path, tmp_path / name, "--no-sync", prefix=traced(log))
    assert code == 0, text
    assert len(re.findall(r"(pread64|pwrite64|copy_file_range)\(", log.read_text())) < 60


@needs_strace
@pytest.mark.parametrize("error", ["EXDEV", "EINVAL", "EOPNOTSUPP", "ENOSYS"])
@pytest.mark.parametrize("when", ["1+", "2"])
def test_where_the_kernel_does_not_copy_memory_does(error: str, when: str, tmp_path: Path) -> None:
    state = {"a": torch.randn(70000), "b": torch.randn(500, 400).t(), "c": torch.randn(80000)}
    path = save(state, tmp_path / "x.pt")
    inject = ("-e", f"inject=copy_file_range:error={error}:when={when}")
    args = ("convert", path, tmp_path / "x.safetensors", "--no-sync")
    code, text = run(*args, prefix=traced(tmp_path / "log", *inject))
    assert code == 0, text
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(raw(loaded[key]) == raw(value) for key, value in state.items())


@needs_strace
@pytest.mark.parametrize("call", ["copy_file_range", "pwrite64", "pread64"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", ["y.safetensors", "y.pt"])
def test_a_failed_system_call_leaves_the_target_as_it_was(name: str, call: str, error: str, tmp_path: Path) -> None:
    path = save({"a": torch.randn(70000), "b": torch.randn(5)}, tmp_path / "x.pt")
    out = tmp_path / name
    out.write_bytes(b"old")
    inject = ("-e", f"inject={call}:error={error}:when={3 if call == 'pread64' else 1}+")
    code, text = run("convert", path, out, prefix=traced(tmp_path / "log", *inject))
    assert code == 2
    assert str(path if call == "pread64" else out) in text
    assert out.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


@needs_strace
@pytest.mark.parametrize("call", ["copy_file_range", "pwrite64", "fsync", "rename,renameat,renameat2"])
@pytest.mark.parametrize("name", ["y.safetensors", "y.pt"])
def test_killed_at_any_step_the_target_is_as_it_was(name: str, call: str, tmp_path: Path) -> None:
    path = save({"a": torch.randn(70000), "b": torch.randn(5)}, tmp_path / "x.pt")
    out = tmp_path / name
    out.write_bytes(b"old")
    prefix = (
        "strace",
        "-f",
        "-o",
        "/dev/null",
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:error=EIO:signal=KILL:when=1",
    )
    code, _ = run("convert", path, out, prefix=prefix)
    assert code in {-9, 137}
    assert out.read_bytes() == b"old"
    assert len(leftovers(tmp_path)) == 1, "what is left has a name that says whose it is"


@needs_strace
@pytest.mark.parametrize("change", ["overwrite", "truncate", "touch"])
def test_a_source_that_changes_meanwhile_is_an_error(change: str, tmp_path: Path) -> None:
    path = save({"a": torch.randn(200_000), "b": torch.randn(5)}, tmp_path / "x.pt")
    start, _ = record_at(path, "data/0")
    prefix = traced(tmp_path / "log", "-e", "inject=copy_file_range:delay_enter=2000000")
    with subprocess.Popen(
        [*prefix, BINARY, "convert", path, tmp_path / "x.safetensors"], stderr=subprocess.PIPE
    ) as child:
        deadline = time.monotonic() + 30
        while "copy_file_range" not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if change == "overwrite":
            flip(path, start)
        elif change == "truncate":
            os.truncate(path, start + 100)
        else:
            path.touch()
        _, text = child.communicate()
    assert child.returncode == 2
    assert str(path) in text.decode()
    assert not (tmp_path / "x.safetensors").exists()
    assert leftovers(tmp_path) == []
