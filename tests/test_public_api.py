"""What other people's code rests on: names, types, exceptions, and what an import costs."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import reweft
import reweft.errors

MODULES = [
    "reweft",
    "reweft.errors",
    "reweft.keymap",
    "reweft.limits",
    "reweft.checkpoint",
    "reweft.config",
    "reweft.diff",
    "reweft.refitting",
    "reweft.torch",
]


def test_import_does_not_import_torch() -> None:
    code = "import sys, reweft; print(sorted({'torch', 'numpy', 'reweft.torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"
    assert done.stderr == ""


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public).__doc__, public


def test_every_exception_is_public_and_has_the_base_that_callers_expect() -> None:
    bases = {
        "FormatError": ValueError,
        "UnsupportedError": ValueError,
        "LimitError": ValueError,
        "NotFoundError": KeyError,
        "KeyCollisionError": ValueError,
        "MismatchError": ValueError,
        "RunError": RuntimeError,
        "UsageError": ValueError,
        "IoError": OSError,
    }
    assert {*bases, "ReweftError"} == set(reweft.errors.__all__)
    for name, base in bases.items():
        kind = getattr(reweft, name)
        assert issubclass(kind, reweft.ReweftError)
        assert issubclass(kind, base)


def test_exceptions_print_as_text_and_have_their_parts() -> None:
    assert str(reweft.NotFoundError("x.pt: no 'key'")) == "x.pt: no 'key'"
    assert str(reweft.IoError("x.pt: open: denied")) == "x.pt: open: denied"
    assert str(reweft.FormatError()) == ""
    error = reweft.FormatError("x")
    assert (error.path, error.record, error.byte_offset, error.key, error.hint) == (None,) * 5


def test_an_error_of_the_engine_has_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{]")
    with pytest.raises(reweft.FormatError) as error:
        reweft.open(path)
    assert isinstance(error.value.path, Path)
    assert (error.value.path, error.value.byte_offset) == (path, 8)


def test_typing_marker_is_shipped() -> None:
    assert (Path(reweft.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "name", ["RefitReport", "VerifyReport", "ConvertReport", "DiffReport", "Finding", "TensorInfo"]
)
def test_results_are_frozen(name: str) -> None:
    kind = getattr(reweft, name)
    made = object.__new__(kind)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, 1)


def test_paths_may_be_text_or_path_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert len(reweft.open(path)) == len(reweft.open(str(path))) == 0
    assert repr(reweft.open(path)) == f"<Checkpoint {str(path)!r}: safetensors, 0 tensors>"
