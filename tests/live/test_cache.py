"""The cache of compiled libraries: unpacked once, never trusted, bounded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import reweft
import reweft.torch as rt
from support import assert_same, child

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from support import Package

# Loads a package, calls it, and prints which files of libraries the process has mapped, and the sum of the output.
LOAD = """
import sys
import torch
import reweft.torch as rt
model = rt.load(sys.argv[1])
output = model(*torch.load(sys.argv[2]))
libraries = {line.split()[-1] for line in open("/proc/self/maps")}
mapped = sorted(path for path in libraries if len(path.rsplit("/", 1)[-1]) == 67)
print(*mapped)
torch.save(output, sys.argv[3])
"""


class Loader:
    """Loads `digits` in processes of their own."""

    def __init__(self, package: Package, folder: Path) -> None:
        self.package = package
        self.folder = folder
        self.cache = folder / "cache"
        self.inputs = folder / "inputs.pt"
        torch.save(package.inputs, self.inputs)

    def __call__(self, before: Sequence[str] = (), **env: str) -> list[str]:
        """Gives the cached libraries that the process ran."""
        out = self.folder / "output.pt"
        env = {"REWEFT_CACHE_DIR": str(self.cache), **env}
        done = child(LOAD, self.package.path, self.inputs, out, env=env, before=before)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert torch.allclose(torch.load(out), self.package.eager(0), atol=1e-5)
        return done.stdout.split()

    def libraries(self) -> list[Path]:
        return sorted((self.cache / "libraries").glob("*.so"))


@pytest.fixture
def load(digits: Package, tmp_path: Path) -> Loader:
    return Loader(digits, tmp_path)


def test_a_library_is_unpacked_once_for_all_processes(load: Loader) -> None:
    (first,) = load()
    (path,) = load.libraries()
    assert first == str(path)
    assert path.stat().st_mode & 0o777 == 0o500
    assert path.parent.stat().st_mode & 0o777 == 0o700
    before = path.stat().st_ino
    assert load() == [first]
    assert path.stat().st_ino == before


@pytest.mark.parametrize("how", ["tampered", "cut", "empty", "link"])
def test_what_is_not_the_packages_library_is_replaced_before_it_is_opened(how: str, load: Loader) -> None:
    load()
    (path,) = load.libraries()
    wanted = path.read_bytes()
    path.unlink()
    if how == "link":
        (load.folder / "other").write_bytes(wanted)
        path.symlink_to(load.folder / "other")
    else:
        middle = len(wanted) // 2
        tampered = wanted[:middle] + bytes([wanted[middle] ^ 1]) + wanted[middle + 1 :]
        path.write_bytes({"tampered": tampered, "cut": wanted[:middle], "empty": b""}[how])
    assert load() == [str(path)]
    assert not path.is_symlink()
    assert path.read_bytes() == wanted


def test_processes_that_race_all_load(load: Loader) -> None:
    line = [sys.executable, "-c", LOAD, str(load.package.path), str(load.inputs)]
    paths = os.pathsep.join(filter(None, sys.path))
    env = {**os.environ, "PYTHONPATH": paths, "REWEFT_CACHE_DIR": str(load.cache)}
    outputs = [load.folder / f"{number}.pt" for number in range(4)]
    running = [subprocess.Popen([*line, str(out)], env=env, stdout=subprocess.DEVNULL) for out in outputs]
    assert [process.wait(120) for process in running] == [0] * len(running)
    assert all(torch.equal(torch.load(out), torch.load(outputs[0])) for out in outputs)
    assert len(load.libraries()) == 1
    assert sorted(path.name for path in (load.cache / "libraries").iterdir()) == [".lock", load.libraries()[0].name]


@pytest.mark.parametrize("how", ["group-writable", "parent-writable", "link", "file", "off", "too small"])
def test_without_a_safe_folder_a_temporary_file_serves(how: str, load: Loader) -> None:
    folder = load.cache / "libraries"
    env = {}
    if how == "group-writable":
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o770)
    elif how == "parent-writable":
        (load.folder / "open").mkdir()
        (load.folder / "open").chmod(0o777)
        env["REWEFT_CACHE_DIR"] = str(load.folder / "open" / "cache")
    elif how == "link":
        (load.folder / "elsewhere").mkdir(mode=0o700)
        load.cache.mkdir(mode=0o700)
        folder.symlink_to(load.folder / "elsewhere")
    elif how == "file":
        load.cache.write_text("")
    else:
        env["REWEFT_CACHE_SIZE"] = {"off": "0", "too small": "1KiB"}[how]
    before = sorted(load.folder.rglob("*.so"))
    assert load(**env) == []
    assert sorted(load.folder.rglob("*.so")) == before


# Mounts a file system whose files the loader does not map, and keeps it from all other processes.
NOEXEC = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o noexec,mode=700 tmpfs "$0" && exec "$@"')


@pytest.fixture
def noexec(tmp_path: Path) -> tuple[str, ...]:
    """A command line under which `tmp_path / "noexec"` is such a file system."""
    folder = tmp_path / "noexec"
    folder.mkdir(mode=0o700)
    line = (*NOEXEC, str(folder))
    if shutil.which("unshare") is None or subprocess.run([*line, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only who may mount can mount a file system without execution")
    return line


def test_for_a_folder_without_execution_a_temporary_file_serves(load: Loader, noexec: tuple[str, ...]) -> None:
    folder = str(load.folder / "noexec")
    assert load(noexec, REWEFT_CACHE_DIR=folder) == []
    # Anywhere else the cache is used under the same command line.
    assert len(load(noexec)) == 1


def test_without_any_folder_with_execution_the_error_says_so(load: Loader, noexec: tuple[str, ...]) -> None:
    folder = str(load.folder / "noexec")
    code = "import sys, reweft.torch as rt; rt.load(sys.argv[1])"
    done = child(code, load.package.path, env={"REWEFT_CACHE_DIR": folder, "TMPDIR": folder}, before=noexec)
    assert done.returncode == 1
    assert "RunError" in done.stderr
    assert "hint: " in done.stderr
    assert "REWEFT_CACHE_DIR" in done.stderr


def test_a_size_that_is_no_size_is_an_error(digits: Package, tmp_path: Path) -> None:
    code = "import sys, reweft.torch as rt; rt.load(sys.argv[1])"
    done = child(code, digits.path, env={"REWEFT_CACHE_SIZE": "a lot", "REWEFT_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert "UsageError" in done.stderr
    assert "REWEFT_CACHE_SIZE" in done.stderr


def test_packages_of_one_program_share_its_library_and_not_their_weights(
    digits: Package, digits_b: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.pt2"
    reweft.refit(digits.path, digits_b, out=other)
    first, second = digits.load(), rt.load(other)
    wanted = [first(*digits.inputs), second(*digits.inputs)]
    assert torch.allclose(wanted[0], digits.eager(0), atol=1e-5)
    assert torch.allclose(wanted[1], digits.eager(1), atol=1e-5)
    rt.replace_weights(first, digits_b)
    for _ in range(3):
        assert_same(first(*digits.inputs), wanted[1])
        assert_same(second(*digits.inputs), wanted[1])
    rt.replace_weights(first, digits.module(0))
    assert_same([first(*digits.inputs), second(*digits.inputs)], wanted)


def test_a_second_loading_touches_no_file(digits: Package, library_cache: Path) -> None:
    wanted = digits.load()(*digits.inputs)
    for path in (library_cache / "libraries").glob("*.so"):
        path.unlink()
    assert_same(digits.load()(*digits.inputs), wanted)
    assert list((library_cache / "libraries").glob("*.so")) == []


def test_what_was_used_longest_ago_goes_first(load: Loader, tied: Package, mixed: Package) -> None:
    load()
    (path,) = load.libraries()
    nbytes = path.stat().st_size
    os.utime(path, (1, 1))
    for number, package in enumerate((tied, mixed)):
        loader = Loader(package, load.folder)
        env = {"REWEFT_CACHE_DIR": str(load.cache), "REWEFT_CACHE_SIZE": str(nbytes * 5 // 2)}
        done = child("import sys, reweft.torch as rt; rt.load(sys.argv[1])", loader.package.path, env=env)
        assert done.returncode == 0, done.stderr
        assert path.exists() == (number == 0)
    assert len(load.libraries()) == 2
