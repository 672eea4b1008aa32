"""`reweft run`: a process without Python runs a package. The reference is eager, with the same weights."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from test_cli import BINARY, Cli
from torch import nn

import reweft.torch as rt
from support import save_state

if TYPE_CHECKING:
    from support import Package

SERVE = BINARY.parent / "serve"
LIBTORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    if not BINARY.exists():
        pytest.skip(f"{BINARY} is not built")
    return Cli(str(BINARY), tmp_path)


def arrays(package: Package, folder: Path) -> list[Path]:
    """The inputs as files."""
    paths = [folder / f"in{number}.npy" for number in range(len(package.inputs))]
    for path, value in zip(paths, package.inputs, strict=True):
        np.save(path, value.numpy())
    return paths


def run(cli: Cli, package: Path, inputs: list[Path], outputs: list[Path], *more: object) -> Any:
    args = [argument for path in inputs for argument in ("--input", path)]
    args += [argument for path in outputs for argument in ("--output", path)]
    return cli.json("run", package, *args, "--libtorch", LIBTORCH, *more)


def test_outputs_are_those_of_eager(cli: Cli, digits: Package, tmp_path: Path) -> None:
    before = digits.path.read_bytes()
    inputs, out = arrays(digits, tmp_path), tmp_path / "y.npy"
    report = run(cli, digits.path, inputs, [out])
    wanted = digits.eager(0)
    found = np.load(out)
    assert report == {
        "outputs": [{"file": str(out), "dtype": "float32", "shape": list(wanted.shape)}],
        "slots": None,
        "notices": [],
    }
    assert found.dtype == np.float32
    # Sums are taken in another order than eager takes them.
    assert np.allclose(found, wanted.numpy(), atol=1e-5)
    assert np.array_equal(found, digits.load()(*digits.inputs).numpy())

    weights = save_state(digits.module(1), tmp_path / "b.pt")
    assert run(cli, digits.path, inputs, [out], "--weights", weights)["slots"] > 0
    assert np.allclose(np.load(out), digits.eager(1).numpy(), atol=1e-5)
    assert not np.allclose(np.load(out), found, atol=1e-3)
    assert digits.path.read_bytes() == before


def test_several_inputs_and_layouts(cli: Cli, weightless: Package, tmp_path: Path) -> None:
    x, y = (value.numpy() for value in weightless.inputs)
    wanted = weightless.eager(0)
    leaves = [wanted] if isinstance(wanted, torch.Tensor) else list(wanted)
    outputs = [tmp_path / f"out{number}.npy" for number in range(len(leaves))]
    for first in (x, np.asfortranarray(x), x.astype(">f4")):
        np.save(tmp_path / "x.npy", first)
        np.save(tmp_path / "y.npy", y)
        run(cli, weightless.path, [tmp_path / "x.npy", tmp_path / "y.npy"], outputs)
        for path, leaf in zip(outputs, leaves, strict=True):
            assert np.allclose(np.load(path), leaf.numpy(), atol=1e-6)


def test_what_does_not_fit_is_an_error_and_writes_nothing(cli: Cli, digits: Package, tmp_path: Path) -> None:
    (path,) = arrays(digits, tmp_path)
    x, out = np.load(path), tmp_path / "y.npy"

    def fails(*args: object) -> str:
        return cli.fails("run", digits.path, *args, "--output", out, "--libtorch", LIBTORCH)

    np.save(tmp_path / "shape.npy", x[:1])
    said = fails("--input", tmp_path / "shape.npy")
    assert "shape [1, 1, 8, 8]" in said
    assert "[2, 1, 8, 8]" in said
    np.save(tmp_path / "dtype.npy", x.astype(np.float64))
    said = fails("--input", tmp_path / "dtype.npy")
    assert "float64" in said
    assert "float32" in said
    np.save(tmp_path / "text.npy", np.array(["a"]))
    assert "text.npy" in fails("--input", tmp_path / "text.npy")
    (tmp_path / "cut.npy").write_bytes(path.read_bytes()[:-1])
    assert "cut.npy" in fails("--input", tmp_path / "cut.npy")
    assert "2 inputs" in fails("--input", path, "--input", path)
    assert "--output names 2 files" in fails("--input", path, "--output", tmp_path / "z.npy")
    assert "absent.pt2" in cli.fails("run", "absent.pt2", "--output", out, "--libtorch", LIBTORCH)
    assert not out.exists()
    assert not (tmp_path / "z.npy").exists()


def without_python() -> dict[str, str]:
    hidden = ("REWEFT_LIBTORCH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PATH")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def test_libtorch_is_found_or_its_absence_explained(cli: Cli, digits: Package, tmp_path: Path) -> None:
    (path,) = arrays(digits, tmp_path)
    line = [cli.command, "run", str(digits.path), "--input", str(path), "--output", str(tmp_path / "y.npy")]

    def call(*more: str, code: int = 0, **env: str) -> str:
        settings = {**without_python(), **env}
        done = subprocess.run([*line, *more], capture_output=True, text=True, check=False, env=settings, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stderr

    said = call(code=2)
    assert "no libtorch" in said
    assert "hint: --libtorch or REWEFT_LIBTORCH" in said
    said = call("--libtorch", str(tmp_path), code=2)
    assert str(tmp_path) in said
    assert "libtorch_cpu.so" in said
    assert "not loaded" in call("--libtorch", str(path), code=2)
    call(REWEFT_LIBTORCH=str(LIBTORCH))
    call(REWEFT_LIBTORCH=str(LIBTORCH.parent))
    environment = next(above for above in LIBTORCH.parents if above.name.startswith("python3")).parents[1]
    call(VIRTUAL_ENV=str(environment))
    call("--libtorch", str(LIBTORCH.parents[1]), VIRTUAL_ENV=str(tmp_path))


def test_the_example_refits_live_what_a_refit_on_disk_gives(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    if not SERVE.exists():
        pytest.skip(f"{SERVE} is not built")
    (path,) = arrays(digits, tmp_path)
    line = [str(SERVE), str(digits.path), str(digits_b), str(path)]
    env = {**without_python(), "REWEFT_LIBTORCH": str(LIBTORCH)}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    saved, _slots, refitted, equal = done.stdout.splitlines()
    assert saved.removeprefix("as saved: ") != refitted.removeprefix("refitted: ")
    assert equal == "equal to the outputs of an artifact refitted on disk"
    first = float(refitted.split("Some(")[1].rstrip(")"))
    assert first == pytest.approx(digits.eager(1).reshape(-1)[0].item(), abs=1e-5)


class Solver(nn.Module):
    """Its operator has no C function, so that the program leaves it to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        solved: torch.Tensor = torch.linalg.solve(self.matrix, x)
        return solved


@pytest.mark.filterwarnings("ignore:.*c-shim implementation")
def test_operators_that_need_python_are_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    package, x = tmp_path / "model.pt2", tmp_path / "x.npy"
    rt.save(rt.trace(Solver().eval(), torch.ones(3)), package)
    np.save(x, np.ones(3, np.float32))
    said = cli.fails("run", package, "--input", x, "--output", tmp_path / "y.npy", "--libtorch", LIBTORCH)
    assert "aten::_linalg_solve_ex" in said
    assert "hint: run it with reweft.torch.load" in said
    assert not (tmp_path / "y.npy").exists()
