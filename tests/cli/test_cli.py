"""The `reweft` command: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import reweft
from support import child, flip, leftovers, record_at, save, without_crc

if TYPE_CHECKING:
    from support import Package

BINARY = Path(__file__).parents[2] / "target/release/reweft"
SCRIPT = Path(sys.executable).parent / "reweft"


@pytest.fixture(scope="module", params=[BINARY, SCRIPT], ids=["binary", "script"])
def command(request: pytest.FixtureRequest) -> str:
    """The binary and the wheel's console script, which are to be the same."""
    path: Path = request.param
    if not path.exists():
        pytest.skip(f"{path} is not built")
    return str(path)


class Cli:
    """Runs the command with pipes, as scripts do."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command = command
        self.folder = folder

    def __call__(self, *args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        line = [self.command, *map(str, args)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=self.folder, timeout=60)
        assert done.returncode == code, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "\r" not in done.stdout + done.stderr
        return done

    def json(self, *args: object, code: int = 0) -> Any:
        """With `--json`: stdout is one document, stderr is empty."""
        done = self(*args, "--json", code=code)
        assert done.stderr == ""
        return json.loads(done.stdout)

    def fails(self, *args: object) -> str:
        """Exit code 2, nothing on stdout, an error on stderr; gives it."""
        done = self(*args, code=2)
        assert done.stdout == ""
        assert done.stderr.startswith("reweft: error: ")
        return done.stderr


@pytest.fixture
def cli(command: str, tmp_path: Path) -> Cli:
    return Cli(command, tmp_path)


@pytest.fixture
def training(digits: Package, tmp_path: Path) -> Path:
    """Weights for `digits` as people save them."""
    state = {f"module.{key}": value for key, value in digits.module(1).state_dict().items()}
    return save({"epoch": 3, "model_state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "epoch3.pt")


UNWRAP = ("--top-level-key", "model_state_dict", "--remap", r"^module\.(.*)$=$1")


def has_hint(stderr: str) -> bool:
    return any(line.startswith("hint: ") for line in stderr.splitlines())


class TestInspect:
    def test_checkpoint_as_a_table(self, cli: Cli, tmp_path: Path) -> None:
        weight = torch.randn(3, 4)
        path = save({"a.w": weight, "b.w": weight.t(), "s": {torch.ones(1)}, "epoch": 7}, tmp_path / "x.pt")
        done = cli("inspect", path)
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["KEY", "DTYPE", "SHAPE", "STRIDES", "BYTES", "STORAGE"]
        assert lines[1].split() == ["a.w", "float32", "[3,", "4]", "48", "0+0"]
        assert lines[2].split() == ["b.w", "float32", "[4,", "3]", "[1,", "4]", "48", "0+0"]
        assert "shared storage: a.w, b.w" in lines
        assert any(line.startswith("cannot be read: s: ") for line in lines)
        assert "not a tensor: epoch (int 7)" in lines
        assert lines[-1] == "torch zip: 2 tensors, 96 bytes, in storages of 48 bytes"
        assert done.stderr == ""

    def test_checkpoint_as_json(self, cli: Cli, training: Path) -> None:
        data = cli.json("inspect", training)
        wanted = torch.load(training)["model_state_dict"]
        assert (data["kind"], data["format"]) == ("checkpoint", "torch zip")
        assert [tensor["key"] for tensor in data["tensors"]] == [f"model_state_dict.{key}" for key in wanted]
        for tensor, value in zip(data["tensors"], wanted.values(), strict=True):
            assert tensor["shape"] == list(value.shape)
            assert tensor["strides"] == list(value.stride())
            assert tensor["dtype"] == str(value.dtype).removeprefix("torch.")
            assert tensor["nbytes"] == value.numel() * value.element_size()
        assert {"path": "epoch", "what": "int 3"} in data["values"]
        assert data["storage_nbytes"] == sum(tensor["nbytes"] for tensor in data["tensors"])

    def test_keys_are_mapped(self, cli: Cli, training: Path) -> None:
        data = cli.json("inspect", training, *UNWRAP, "--select", "fc", "--remap", "^fc=head")
        assert [tensor["key"] for tensor in data["tensors"]] == ["head.weight", "head.bias"]

    def test_package_as_a_table(self, cli: Cli, tied: Package) -> None:
        lines = cli("inspect", tied.path).stdout.splitlines()
        assert lines[0].split() == ["SLOT", "DTYPE", "SHAPE", "BYTES", "REMARKS"]
        assert lines[1].split() == ["embedding.weight", "float32", "[20,", "8]", "640", "also", "head.weight"]
        assert lines[-1] == "AOTInductor package: 1 slots, 640 bytes"

    def test_package_as_json(self, cli: Cli, mixed: Package) -> None:
        data = cli.json("inspect", mixed.path)
        slots = {slot["name"]: slot for slot in data["slots"]}
        assert data["kind"] == "artifact"
        assert data["has_manifest"]
        assert set(slots) == {"conv.weight", "conv.bias", "phase", "order", "window", "offset"}
        assert slots["phase"]["dtype"] == "complex64"
        assert slots["conv.weight"]["strides"] == [27, 1, 9, 3]
        assert not slots["window"]["persistent"]
        assert data["unrefittable"] == []
        for slot in slots.values():
            assert slot["hash"].startswith("blake3:")
            assert slot["obstacle"] is None

    def test_buffers_that_the_program_writes_are_marked(self, cli: Cli, counter: Package) -> None:
        slots = {slot["name"]: slot for slot in cli.json("inspect", counter.path)["slots"]}
        assert {name for name, slot in slots.items() if slot["mutated"]} == {"total", "calls"}
        assert cli("inspect", counter.path).stdout.count("written by the program") == 2

    def test_package_of_torch_says_what_it_lacks(self, cli: Cli, stock_embedded: Package) -> None:
        done = cli("inspect", stock_embedded.path)
        assert "fc.weight" in done.stdout
        assert "fc.bias" not in done.stdout
        assert done.stderr.startswith("reweft: note: no manifest")

    def test_notices_are_no_data(self, cli: Cli, tmp_path: Path) -> None:
        path = without_crc({"w": torch.ones(1)}, tmp_path / "x.pt")
        done = cli("inspect", path)
        assert done.stderr.startswith("reweft: note: ")
        assert "no CRC" not in done.stdout
        assert cli.json("inspect", path)["notices"]


class TestConvert:
    def test_weights_arrive(self, cli: Cli, training: Path, tmp_path: Path) -> None:
        done = cli("convert", training, "out.safetensors", *UNWRAP)
        loaded, wanted = load_file(tmp_path / "out.safetensors"), torch.load(training)["model_state_dict"]
        assert set(loaded) == {key.removeprefix("module.") for key in wanted}
        assert all(torch.equal(value, wanted[f"module.{key}"]) for key, value in loaded.items())
        assert done.stdout.startswith(f"out.safetensors: {len(wanted)} tensors, ")
        assert len(done.stdout.splitlines()) == 1

    def test_report(self, cli: Cli, training: Path) -> None:
        data = cli.json("convert", training, "out.safetensors")
        assert data["tensors"] == len(torch.load(training)["model_state_dict"])
        assert data["out"] == "out.safetensors"
        assert any("epoch" in item for item in data["not_carried"])

    def test_shared_tensors(self, cli: Cli, tmp_path: Path) -> None:
        weight = torch.ones(3)
        path = save({"a": weight, "b": weight}, tmp_path / "x.pt")
        stderr = cli.fails("convert", path, "out.safetensors")
        assert '"a" and "b"' in stderr
        assert has_hint(stderr)
        assert cli.json("convert", path, "out.safetensors", "--shared", "duplicate")["tensors"] == 2
        data = cli.json("convert", path, "out.safetensors", "--shared", "drop-aliases")
        assert data["dropped_aliases"] == {"b": "a"}

    def test_format_goes_by_extension_or_option(self, cli: Cli, training: Path, tmp_path: Path) -> None:
        stderr = cli.fails("convert", training, "out.gguf")
        assert ".safetensors" in stderr
        assert has_hint(stderr)
        cli("convert", training, "out.gguf", "--format", "safetensors", "--no-sync")
        cli("convert", training, "out.safetensors")
        assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "out.safetensors").read_bytes()

    def test_floats_in_another_dtype(self, cli: Cli, training: Path, tmp_path: Path) -> None:
        cli("convert", training, "out.safetensors", "--dtype", "bf16", *UNWRAP)
        dtypes = {info.dtype for info in reweft.open(tmp_path / "out.safetensors").values()}
        assert "bfloat16" in dtypes
        assert "float32" not in dtypes
        assert "float99" in cli.fails("convert", training, "out.safetensors", "--dtype", "float99")

    def test_to_pt_and_what_the_report_says(self, cli: Cli, tmp_path: Path) -> None:
        base = torch.randn(100)
        path = save({"a": base[:3], "b": base[1:4]}, tmp_path / "x.pt")
        done = cli("convert", path, "out.pth")
        assert "384 bytes that no tensor shows were left out of the storage of a" in done.stderr
        loaded = torch.load(tmp_path / "out.pth")
        assert torch.equal(loaded["b"], base[1:4])
        assert loaded["a"].untyped_storage().data_ptr() == loaded["b"].untyped_storage().data_ptr()


class TestPlan:
    def test_good_plan(self, cli: Cli, digits: Package, training: Path) -> None:
        done = cli("plan", digits.path, training, *UNWRAP)
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["SLOT", "DTYPE", "SHAPE", "BYTES", "RECIPE"]
        assert lines[-1].startswith(f"{slots_of(digits)} slots to fill with ")
        assert lines[-1].endswith("0 kept, 0 findings block a refit")
        assert sum(line.startswith("note: ") for line in lines) == 2

    def test_bad_plan_exits_with_1(self, cli: Cli, digits: Package, training: Path) -> None:
        done = cli("plan", digits.path, training, "--top-level-key", "model_state_dict", code=1)
        assert 'blocks: key "module.fc.weight": no slot has this name' in done.stdout
        assert "  hint: " in done.stdout
        data = cli.json("plan", digits.path, training, "--top-level-key", "model_state_dict", code=1)
        kinds = [finding["kind"] for finding in data["findings"] if finding["blocking"]]
        assert kinds.count("missing") == slots_of(digits)
        assert kinds.count("unused") == len(torch.load(training)["model_state_dict"])

    def test_plan_as_json(self, cli: Cli, digits: Package, training: Path) -> None:
        data = cli.json("plan", digits.path, training, *UNWRAP)
        assert len(data["refills"]) == slots_of(digits)
        assert data["kept"] == []
        assert data["refills"][0]["recipe"][0]["op"] == "leaf"

    def test_binary_and_python_agree(self, cli: Cli, digits: Package, training: Path) -> None:
        keys = reweft.KeyMap([(r"^module\.(.*)$", "$1")])
        plan = reweft.plan(digits.path, training, top_level_key="model_state_dict", keys=keys)
        assert cli.json("plan", digits.path, training, *UNWRAP) == json.loads(plan.to_json())


def slots_of(package: Package) -> int:
    return sum("num_batches" not in key for key in package.module(0).state_dict())


class TestRefit:
    def test_refit_then_verify(self, cli: Cli, digits: Package, training: Path, digits_b: Path, tmp_path: Path) -> None:
        done = cli("refit", digits.path, training, "-o", "new.pt2", *UNWRAP)
        count = slots_of(digits)
        assert done.stdout.startswith(f"new.pt2: {count} slots filled with ")
        assert len(done.stdout.splitlines()) == 1
        reweft.refit(digits.path, digits_b, out=tmp_path / "python.pt2")
        assert (tmp_path / "new.pt2").read_bytes() == (tmp_path / "python.pt2").read_bytes()
        verdict = cli("verify", "new.pt2", training, *UNWRAP).stdout
        assert verdict.startswith(f"equal: {count} slots, ")
        verdict = cli("verify", digits.path, training, *UNWRAP, code=1).stdout
        assert verdict.splitlines()[-1].startswith(f"different: {count} slots, ")
        assert 'blocks: slot "fc.weight"' in verdict

    def test_reports(self, cli: Cli, digits: Package, training: Path) -> None:
        data = cli.json("refit", digits.path, training, "-o", "new.pt2", *UNWRAP)
        assert (data["slots"], data["slots_changed"], data["kept"]) == (slots_of(digits),) * 2 + ([],)
        assert cli.json("verify", "new.pt2", training, *UNWRAP)["equal"] is True
        data = cli.json("verify", digits.path, training, *UNWRAP, code=1)
        assert data["equal"] is False
        assert len(data["differences"]) == slots_of(digits)

    def test_refused_refit_writes_nothing(self, cli: Cli, digits: Package, training: Path, tmp_path: Path) -> None:
        shutil.copy(digits.path, tmp_path / "own.pt2")
        stderr = cli.fails("refit", "own.pt2", training, "-o", "own.pt2", "--top-level-key", "model_state_dict")
        assert "module.scale" in stderr
        assert str(training) in stderr
        assert has_hint(stderr)
        assert (tmp_path / "own.pt2").read_bytes() == digits.path.read_bytes()
        assert leftovers(tmp_path) == []

    def test_options_allow_what_they_say(self, cli: Cli, digits: Package, tmp_path: Path) -> None:
        state = dict(digits.module(1).state_dict())
        state["fc.weight"] = state["fc.weight"].double()
        state["extra"] = torch.ones(1)
        del state["scale"]
        path = save(state, tmp_path / "x.pt")
        allow = ["--allow-cast", "--allow-missing", "--allow-unused"]
        for left_out in allow:
            given = [option for option in allow if option != left_out]
            cli.fails("refit", digits.path, path, "-o", "new.pt2", *given)
            assert not (tmp_path / "new.pt2").exists()
        assert cli.json("refit", digits.path, path, "-o", "new.pt2", *allow)["kept"] == ["scale"]

    def test_damaged_checkpoint(self, cli: Cli, digits: Package, digits_b: Path, tmp_path: Path) -> None:
        start, _ = record_at(digits_b, "/data/3")
        flip(digits_b, start)
        stderr = cli.fails("refit", digits.path, digits_b, "-o", "new.pt2")
        assert "CRC" in stderr
        assert has_hint(stderr)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b.pt"]

    def test_checkpoint_and_artifact_exchanged(self, cli: Cli, digits: Package, digits_b: Path) -> None:
        assert has_hint(cli.fails("refit", digits_b, digits.path, "-o", "new.pt2"))
        assert has_hint(cli.fails("refit", digits.path, digits.path, "-o", "new.pt2"))


class TestErrors:
    @pytest.mark.parametrize("subcommand", ["inspect", "convert", "plan", "refit", "verify"])
    def test_absent_file(self, subcommand: str, cli: Cli, digits: Package) -> None:
        args: dict[str, list[object]] = {
            "inspect": ["absent.pt"],
            "convert": ["absent.pt", "x.safetensors"],
            "refit": [digits.path, "absent.pt", "-o", "x.pt2"],
        }
        assert "absent.pt" in cli.fails(subcommand, *args.get(subcommand, [digits.path, "absent.pt"]))

    @pytest.mark.parametrize(
        "options",
        [
            ["--remap", "no equals sign"],
            ["--remap", "(=x"],
            ["--remap", r"^(\w+)\.=$1_x"],
            ["--select", "["],
            ["--select", "^nothing"],
            ["--top-level-key", "model"],
        ],
        ids=" ".join,
    )
    def test_bad_key_options(self, options: list[str], cli: Cli, training: Path) -> None:
        cli.fails("inspect", training, *options)

    def test_absent_top_level_key_suggests_the_nearest(self, cli: Cli, training: Path) -> None:
        stderr = cli.fails("inspect", training, "--top-level-key", "model_statedict")
        assert 'hint: did you mean "model_state_dict"?' in stderr.splitlines()

    @pytest.mark.parametrize("args", [[], ["frobnicate"], ["inspect"], ["inspect", "x", "--frob"]], ids=" ".join)
    def test_bad_usage_exits_with_2(self, args: list[str], cli: Cli) -> None:
        done = cli(*args, code=2)
        assert done.stdout == ""
        assert "Usage: reweft" in done.stderr

    def test_help_and_version_are_data(self, cli: Cli) -> None:
        for args in (["--help"], ["refit", "--help"], ["--version"]):
            done = cli(*args)
            assert "reweft" in done.stdout
            assert done.stderr == ""

    def test_reader_that_closes_the_pipe_is_no_error(self, command: str, tmp_path: Path) -> None:
        state = {f"layer.{number}.weight": torch.ones(1) for number in range(3000)}
        path = save(state, tmp_path / "many.pt")
        line = f"set -o pipefail; '{command}' inspect '{path}' | head -1"
        done = subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


class TestDiff:
    def test_differences_as_a_table(self, cli: Cli, tmp_path: Path) -> None:
        a = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2), "old": torch.ones(1)}
        b = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.tensor([0.0, 0.25]), "new": torch.ones(1)}
        b["fc.weight"][1, 2] = 3
        save({"model": {f"module.{key}": value for key, value in a.items()}, "epoch": 1}, tmp_path / "a.pt")
        save(b, tmp_path / "b.pt")
        done = cli("diff", "a.pt", "b.pt", "--top-level-key", "model", "--strip-prefix", "module.", code=1)
        lines = done.stdout.splitlines()
        assert lines[0].split() == ["KEY", "DTYPE", "SHAPE", "DIFFERING", "NAN", "MAX", "ABS", "MAX", "REL", "AT"]
        assert lines[1].split()[:2] == ["fc.weight", "float32"]
        assert "1 of 6" in lines[1]
        assert "3.0000e0" in lines[1]
        assert "[1, 2]" in lines[1]
        assert lines[2].startswith("fc.bias")
        assert lines[3:] == [
            "only in a: old float32 [1]",
            "only in b: new float32 [1]",
            "different: 2 tensors on both sides, 32 bytes compared, 2 differ",
        ]

    def test_differences_as_json(self, cli: Cli, tmp_path: Path) -> None:
        save({"w": torch.tensor([1, 2**62])}, tmp_path / "a.pt")
        save({"m": {"w": torch.tensor([1, 0])}, "x": {1}}, tmp_path / "b.pt")
        data = cli.json("diff", "a.pt", "b.pt", "--b-top-level-key", "m", code=1)
        assert data["equal"] is False
        assert data["changed"][0]["max_abs"] == 2**62
        assert data["changed"][0]["at"] == [1]

    def test_equal_files_and_choices(self, cli: Cli, tmp_path: Path) -> None:
        save({"a": torch.ones(1), "b": torch.ones(1), "epoch": 1}, tmp_path / "a.pt")
        save({"a": torch.ones(1), "b": torch.zeros(1), "epoch": 2}, tmp_path / "b.pt")
        assert cli("diff", "a.pt", "a.pt").stdout == "equal: 2 tensors on both sides, 8 bytes compared, 0 differ\n"
        cli("diff", "a.pt", "b.pt", "--only", "^a", code=1)
        cli("diff", "a.pt", "b.pt", "--only", "^a", "--no-values")
        assert "value: epoch: int 1 in a, int 2 in b" in cli("diff", "a.pt", "b.pt", code=1).stdout
        assert "regex" in cli.fails("diff", "a.pt", "b.pt", "--only", "(")

    def test_a_package_against_a_checkpoint(self, cli: Cli, digits: Package, digits_b: Path, tmp_path: Path) -> None:
        data = cli.json("diff", digits.path, digits_b, code=1)
        assert data["a"]["format"] == "AOTInductor package"
        assert data["changed"]
        cli("refit", digits.path, digits_b, "-o", "new.pt2")
        assert cli.json("diff", tmp_path / "new.pt2", digits_b)["equal"]


class TestConfig:
    def test_json(self, cli: Cli, tmp_path: Path) -> None:
        save({"w": torch.ones(1), "cfg": {"lr": 0.1, "big": 10**30, "inf": float("inf")}}, tmp_path / "a.pt")
        done = cli("config", "a.pt", "--key", "cfg")
        assert json.loads(done.stdout) == {"lr": 0.1, "big": 10**30, "inf": {"$float": "inf"}}
        assert done.stderr == ""

    def test_a_tensor_is_an_error_with_its_path(self, cli: Cli, tmp_path: Path) -> None:
        save({"w": [torch.ones(1)]}, tmp_path / "a.pt")
        stderr = cli.fails("config", "a.pt")
        assert 'a.pt: "w.0": ' in stderr
        assert has_hint(stderr)


def test_strip_and_refit(cli: Cli, digits: Package, tmp_path: Path) -> None:
    weights = save(dict(digits.module(1).state_dict()), tmp_path / "x.pt")
    report = cli.json("strip", digits.path, "-o", "net.stripped")
    assert report["slots"] > 0
    assert report["out_nbytes"] == (tmp_path / "net.stripped").stat().st_size
    assert "left out" in cli("strip", digits.path, "-o", "net.stripped", "--keep", "bias$").stdout
    assert "stripped" in cli("inspect", "net.stripped").stdout
    shown = cli.json("inspect", "net.stripped")
    assert shown["stripped"]
    assert {slot["stripped"] for slot in shown["slots"]} == {True, False}
    cli("refit", "net.stripped", weights, "-o", "b.pt2")
    cli("verify", "b.pt2", weights)
    assert "stripped" in cli.fails("verify", "net.stripped", weights)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("REWEFT_CACHE_DIR", str(folder))
    return folder


def test_list_clear_and_path(cli: Cli, cache: Path, digits: Package) -> None:
    assert cli("cache", "path").stdout == f"{cache / 'libraries'}\n"
    assert cli.json("cache", "path") == {"folder": str(cache / "libraries"), "max_nbytes": 1 << 30, "refused": None}
    assert cli.json("cache", "list") == []
    assert cli.json("cache", "clear") == {"libraries": 0, "nbytes": 0}
    assert not cache.exists()

    done = child("import sys, reweft.torch as rt; rt.load(sys.argv[1])", digits.path)
    assert done.returncode == 0, done.stderr
    (entry,) = cli.json("cache", "list")
    (path,) = (cache / "libraries").glob("*.so")
    assert (entry["file"], entry["nbytes"]) == (str(path), path.stat().st_size)
    assert 0 <= entry["idle_seconds"] < 600
    shown = cli("cache", "list").stdout
    assert path.name in shown
    assert shown.endswith(" of 1,073,741,824 bytes\n")

    assert cli.json("cache", "clear") == {"libraries": 1, "nbytes": entry["nbytes"]}
    assert [path.name for path in (cache / "libraries").iterdir()] == [".lock"]
    assert cli("cache", "list").stdout.startswith("0 libraries")


def test_why_a_folder_is_not_used(cli: Cli, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert "written by others" in cli("cache", "path").stderr
    assert "written by others" in cli.json("cache", "path")["refused"]
    assert "written by others" in cli.fails("cache", "clear")
    monkeypatch.setenv("REWEFT_CACHE_SIZE", "0")
    assert cli.json("cache", "path")["folder"] is None
    assert cli("cache", "path").stdout == ""
    monkeypatch.setenv("REWEFT_CACHE_SIZE", "many")
    assert "REWEFT_CACHE_SIZE" in cli.fails("cache", "list")


def test_output_that_cannot_be_written_is_named(command: str, digits: Package, training: Path, tmp_path: Path) -> None:
    line = [command, "refit", str(digits.path), str(training), *UNWRAP, "-o", "out.pt2"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: write to standard output: No space left" in done.stderr
    assert "a file that was to be written is there" in done.stderr
    assert (tmp_path / "out.pt2").exists()
