"""A program that this host cannot run is refused before any of its code is loaded."""

from __future__ import annotations

import json
import platform
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import reweft
import reweft.torch as rt
from support import child, with_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Package

# Prints the error of loading, and whether anything was unpacked or mapped by then.
LOAD = """
import os, sys, reweft, reweft.torch as rt
try:
    rt.load(sys.argv[1])
except reweft.ReweftError as error:
    print(type(error).__name__, error)
unpacked = [name for _, _, names in os.walk(os.environ["REWEFT_CACHE_DIR"]) for name in names]
mapped = [line.split()[-1] for line in open("/proc/self/maps") if os.environ["TMPDIR"] in line and ".so" in line]
print("opened", bool(unpacked or mapped))
"""


def manifest_of(package: Path) -> dict[str, Any]:
    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith("reweft_manifest.json"))
        manifest: dict[str, Any] = json.loads(archive.read(name))
    return manifest


def loaded(package: Path, folder: Path) -> str:
    done = child(LOAD, package, env={"REWEFT_CACHE_DIR": str(folder / "cache"), "TMPDIR": str(folder)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_trace_records_the_host(digits: Package) -> None:
    target = manifest_of(digits.path)["target"]
    assert target["machine"] == platform.machine()
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split()
    assert ("avx2" in target["features"]) == ("avx2" in flags)
    assert ("avx512f" in target["features"]) == ("avx512f" in flags)
    assert ("fma" in target["features"]) == ("fma" in flags)


def lie(manifest: dict[str, Any]) -> None:
    manifest["target"]["features"].append("avx10-lie")


def other_machine(manifest: dict[str, Any]) -> None:
    manifest["target"]["machine"] = "aarch64"


def old_torch(manifest: dict[str, Any]) -> None:
    manifest["torch"] = "2.12.0"


def other_device(manifest: dict[str, Any]) -> None:
    manifest["device"] = "cuda"


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lie, ["avx10-lie", "hint: "]),
        (other_machine, ["aarch64", platform.machine(), "hint: "]),
        (old_torch, ["2.12", "2.13", "hint: "]),
        (other_device, ["cuda", "hint: "]),
    ],
)
def test_what_cannot_run_here_is_refused_before_it_is_opened(
    edit: Callable[[dict[str, Any]], object], parts: list[str], digits: Package, tmp_path: Path
) -> None:
    said = loaded(with_manifest(digits.path, tmp_path / "edited.pt2", edit), tmp_path)
    assert said.startswith("UnsupportedError ")
    assert all(part in said for part in [*parts, "edited.pt2"]), said
    assert said.endswith("opened False\n")


def test_the_unedited_package_is_opened(digits: Package, tmp_path: Path) -> None:
    """What the other tests rest on: the copy itself is sound, and its opening would be seen."""
    copy = with_manifest(digits.path, tmp_path / "copy.pt2", dict)
    assert loaded(copy, tmp_path) == "opened True\n"


def test_what_cannot_run_here_can_be_refitted(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    for number, edit in enumerate((lie, other_device)):
        foreign = with_manifest(digits.path, tmp_path / f"{number}.pt2", edit)
        out = tmp_path / f"{number}-b.pt2"
        reweft.refit(foreign, digits_b, out=out)
        assert reweft.verify(out, digits_b).equal
        assert manifest_of(out)["target"] == manifest_of(foreign)["target"]


def test_another_minor_version_of_torch_is_a_warning(digits: Package, tmp_path: Path) -> None:
    minor = int(torch.__version__.split(".")[1])
    other = f"2.{minor + 1}.0"
    edited = with_manifest(digits.path, tmp_path / "edited.pt2", lambda manifest: manifest.update(torch=other))
    with pytest.warns(rt.HostWarning, match=rf"2\.{minor + 1}.*2\.{minor}"):
        model = rt.load(edited)
    assert torch.allclose(model(*digits.inputs), digits.eager(0), atol=1e-5)


def with_isa(package: Path, out: Path, isa: str) -> Path:
    """A copy without a target in the manifest, whose metadata states an instruction set."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("reweft_manifest.json"):
                data = json.dumps({key: value for key, value in json.loads(data).items() if key != "target"}).encode()
            if name.endswith(".wrapper_metadata.json"):
                data = json.dumps({**json.loads(data), "AOTI_CPU_ISA": isa}).encode()
            target.writestr(name, data)
    return out


def test_without_a_target_the_instruction_set_of_the_metadata_counts(digits: Package, tmp_path: Path) -> None:
    plain = with_isa(digits.path, tmp_path / "plain.pt2", "")
    assert torch.allclose(rt.load(plain)(*digits.inputs), digits.eager(0), atol=1e-5)
    unknown = with_isa(digits.path, tmp_path / "unknown.pt2", "AVX99")
    with pytest.warns(rt.HostWarning, match="AVX99"):
        rt.load(unknown)
