"""Never silently wrong: what does not fit is an error that names file, key, found and wanted, and changes nothing."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch

import reweft
import reweft.torch as rt
from support import assert_hints, assert_same, assert_says, flip, leftovers, raw, record_at, save, save_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support import Package


class Refused(Protocol):
    """Refit, which must fail; gives the error."""

    def __call__(
        self, package: Package, checkpoint: Path, kind: type[reweft.ReweftError], **options: Any
    ) -> pytest.ExceptionInfo[reweft.ReweftError]: ...


def refuse_on_disk(
    package: Package, checkpoint: Path, kind: type[reweft.ReweftError], **options: Any
) -> pytest.ExceptionInfo[reweft.ReweftError]:
    """Both over the package itself and to a file that exists."""
    folder = checkpoint.parent
    own, other = folder / "own.pt2", folder / "other.pt2"
    shutil.copy(package.path, own)
    other.write_bytes(b"old")
    for out in (other, own):
        with pytest.raises(kind) as error:
            reweft.refit(own, checkpoint, out=out, **options)
    assert own.read_bytes() == package.path.read_bytes()
    assert other.read_bytes() == b"old"
    assert leftovers(folder) == []
    return error


def refuse_live(
    package: Package, checkpoint: Path, kind: type[reweft.ReweftError], **options: Any
) -> pytest.ExceptionInfo[reweft.ReweftError]:
    """In a model that serves; outputs and weights stay, bit for bit, and it still takes good weights."""
    model = package.load()
    outputs, state = model(*package.inputs), model.state_dict()
    with pytest.raises(kind) as error:
        rt.replace_weights(model, checkpoint, **options)
    assert_same(model(*package.inputs), outputs)
    assert_same(model.state_dict(), state)
    rt.replace_weights(model, package.module(5))
    fresh = package.load()
    rt.replace_weights(fresh, package.module(5))
    assert_same(model(*package.inputs), fresh(*package.inputs))
    return error


@pytest.fixture(params=[refuse_on_disk, refuse_live], ids=["disk", "live"])
def refused(request: pytest.FixtureRequest) -> Refused:
    found: Refused = request.param
    return found


@pytest.fixture
def state(digits: Package) -> dict[str, torch.Tensor]:
    """Weights that fit `digits`, to be spoilt."""
    return dict(digits.module(1).state_dict())


WRONG_SHAPES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "transposed": ("fc.weight", lambda value: value.t().contiguous(), "float32 [16, 4]", "float32 [4, 16]"),
    "fewer_elements": ("fc.weight", lambda value: value[:3].clone(), "float32 [3, 16]", "float32 [4, 16]"),
    "more_elements": ("fc.bias", lambda value: value.repeat(2), "float32 [8]", "float32 [4]"),
    "same_elements": ("fc.weight", lambda value: value.reshape(64), "float32 [64]", "float32 [4, 16]"),
    "one_element_for_none_dim": ("scale", lambda value: value.reshape(1), "float32 [1]", "float32 []"),
    "none_dim_for_one_element": ("shift", lambda value: value.reshape(()), "float32 []", "float32 [1]"),
    "empty": ("fc.bias", lambda value: value[:0], "float32 [0]", "float32 [4]"),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_wrong_shape(
    case: str, refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    key, change, found, wanted = WRONG_SHAPES[case]
    checkpoint = save({**state, key: change(state[key])}, tmp_path / "x.pt")
    error = refused(digits, checkpoint, reweft.MismatchError, allow_cast=True, allow_missing=True, allow_unused=True)
    assert_says(error, checkpoint, key, f"found {found}", f"wanted {wanted}")
    assert_hints(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_wrong_dtype(
    dtype: torch.dtype, refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state["fc.bias"] = state["fc.bias"].to(dtype)
    checkpoint = save(state, tmp_path / "x.pt")
    error = refused(digits, checkpoint, reweft.MismatchError)
    name = str(dtype).removeprefix("torch.")
    assert_says(error, checkpoint, "fc.bias", f"found {name} [4]", "wanted float32 [4]", "allow_cast")
    assert_hints(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.uint16])
def test_dtype_without_a_conversion_is_refused_even_when_casts_are_allowed(
    dtype: torch.dtype, refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state["fc.bias"] = torch.ones(4).to(dtype)
    error = refused(digits, save(state, tmp_path / "x.pt"), reweft.MismatchError, allow_cast=True)
    assert_says(error, "fc.bias", str(dtype).removeprefix("torch."), "float32 [4]")
    assert_hints(error)


def special_values() -> torch.Tensor:
    """Values that rounding gets wrong: ties, limits, subnormal numbers, infinities, NaN; 128 in all."""
    steps = torch.arange(1, 25, dtype=torch.float64)
    values = [
        1 + steps / 2**9, 1 + steps / 2**12, 1 + steps / 2**24, steps * 2.0**-24, steps * 2.0**-133,
        torch.tensor([0.0, -0.0, 65504, 65519.99, 65520, 1e38, 3.4e38, float("inf"), -float("inf"), float("nan")]),
    ]  # fmt: skip
    flat = torch.cat([value.double() for value in values])
    return flat[:128] if flat.numel() >= 128 else torch.cat([flat, -flat])[:128]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_cast_that_was_asked_for_is_the_cast_of_torch(dtype: torch.dtype, half_width: Package, tmp_path: Path) -> None:
    state = dict(half_width.module(1).state_dict())
    state["up.weight"] = special_values().to(dtype).reshape(16, 8)
    checkpoint = save(state, tmp_path / "x.pt")
    reweft.refit(half_width.path, checkpoint, out=tmp_path / "x.pt2", allow_cast=True)
    model = half_width.load()
    report = rt.replace_weights(model, checkpoint, allow_cast=True)
    wanted = state["up.weight"].to(torch.bfloat16)
    for got in (model.state_dict()["up.weight"], rt.load(tmp_path / "x.pt2").state_dict()["up.weight"]):
        assert raw(got) == raw(wanted)
    assert report.bytes_copied == wanted.numel() * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_cast_to_single_precision(dtype: torch.dtype, digits: Package, tmp_path: Path) -> None:
    state = dict(digits.module(1).state_dict())
    state["fc.weight"] = special_values()[:64].to(dtype).reshape(4, 16)
    state["conv2.weight"] = special_values().repeat(4)[:432].to(dtype).reshape(16, 3, 3, 3)
    reweft.refit(digits.path, save(state, tmp_path / "x.pt"), out=tmp_path / "x.pt2", allow_cast=True)
    got = rt.load(tmp_path / "x.pt2").state_dict()
    for key in ("fc.weight", "conv2.weight"):
        assert raw(got[key]) == raw(state[key].float())


def test_missing_key(refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    del state["bn1.running_var"]
    checkpoint = save(state, tmp_path / "x.pt")
    error = refused(digits, checkpoint, reweft.MismatchError, allow_unused=True, allow_cast=True)
    assert_says(error, checkpoint, "bn1.running_var", "wanted float32 [3]")
    assert_hints(error)


def test_missing_key_that_was_allowed_keeps_its_bytes(
    digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    del state["bn1.running_var"], state["scale"]
    checkpoint = save(state, tmp_path / "x.pt")
    report = reweft.refit(digits.path, checkpoint, out=tmp_path / "x.pt2", allow_missing=True)
    assert set(report.kept) == {"bn1.running_var", "scale"}
    model = digits.load()
    assert set(rt.replace_weights(model, checkpoint, allow_missing=True).kept) == set(report.kept)
    wanted = {**digits.module(0).state_dict(), **state}
    for got in (model.state_dict(), rt.load(tmp_path / "x.pt2").state_dict()):
        assert all(torch.equal(value, wanted[key]) for key, value in got.items())


def test_unused_key(refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state["head.weight"] = torch.ones(2)
    checkpoint = save(state, tmp_path / "x.pt")
    error = refused(digits, checkpoint, reweft.MismatchError, allow_missing=True, allow_cast=True)
    assert_says(error, checkpoint, "head.weight")
    assert_hints(error)


def test_unused_key_that_was_allowed_is_noticed(
    digits: Package, state: dict[str, torch.Tensor], digits_b: Path, tmp_path: Path
) -> None:
    checkpoint = save({**state, "head.weight": torch.ones(2)}, tmp_path / "x.pt")
    report = reweft.refit(digits.path, checkpoint, out=tmp_path / "x.pt2", allow_unused=True)
    assert any("head.weight" in notice for notice in report.notices)
    reweft.refit(digits.path, digits_b, out=tmp_path / "b.pt2")
    assert (tmp_path / "x.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_mistyped_key_suggests_the_slot(
    refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state["fc.wieght"] = state.pop("fc.weight")
    error = refused(digits, save(state, tmp_path / "x.pt"), reweft.MismatchError)
    assert_says(error, "fc.weight", "fc.wieght", "did you mean")


def test_every_finding_is_in_one_message(
    refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state["fc.weight"] = state["fc.weight"].double()
    state["fc.bias"] = torch.ones(5)
    state["extra"] = torch.ones(1)
    del state["scale"]
    error = refused(digits, save(state, tmp_path / "x.pt"), reweft.MismatchError)
    assert_says(error, "fc.weight", "fc.bias", "extra", "scale")


def test_error_attributes_name_file_and_key(
    refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    error = refused(digits, save({**state, "fc.bias": torch.ones(5)}, tmp_path / "x.pt"), reweft.MismatchError)
    assert error.value.path is not None
    assert error.value.key == "fc.bias"


def test_two_keys_remapped_to_one_name(
    refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = save({**state, "ema.fc.weight": state["fc.weight"]}, tmp_path / "x.pt")
    keys = reweft.KeyMap([(r"^ema\.", "")])
    error = refused(digits, checkpoint, reweft.KeyCollisionError, keys=keys)
    assert_says(error, checkpoint, "ema.fc.weight", "fc.weight")
    assert_hints(error)


def test_tied_pair_with_different_values(refused: Refused, tied: Package, tmp_path: Path) -> None:
    state = dict(tied.module(1).state_dict())
    state["head.weight"] = state["head.weight"].clone()
    state["head.weight"][3, 4] += 1
    checkpoint = save(state, tmp_path / "x.pt")
    error = refused(tied, checkpoint, reweft.MismatchError, allow_unused=True, allow_missing=True)
    assert_says(error, checkpoint, "head.weight", "embedding.weight")
    assert_hints(error)


def test_tied_pair_of_different_dtypes(refused: Refused, tied: Package, tmp_path: Path) -> None:
    state = dict(tied.module(1).state_dict())
    state["head.weight"] = state["head.weight"].double()
    refused(tied, save(state, tmp_path / "x.pt"), reweft.MismatchError, allow_cast=True)


@pytest.mark.parametrize("names", [("embedding.weight",), ("head.weight",), ("embedding.weight", "head.weight")])
def test_tied_slot_takes_either_name_and_equal_copies(names: tuple[str, ...], tied: Package, tmp_path: Path) -> None:
    weight = tied.module(1).state_dict()["head.weight"]
    checkpoint = save({name: weight.clone() for name in names}, tmp_path / "x.pt")
    reweft.refit(tied.path, checkpoint, out=tmp_path / "x.pt2")
    model = tied.load()
    rt.replace_weights(model, checkpoint)
    for got in (model, rt.load(tmp_path / "x.pt2")):
        state = got.state_dict()
        assert torch.equal(state["head.weight"], weight)
        assert torch.equal(state["embedding.weight"], weight)
        assert_same(got(*tied.inputs), model(*tied.inputs))


def test_tensor_that_cannot_be_read(
    refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = save({**state, "fc.bias": torch.ones(4).to_sparse()}, tmp_path / "x.pt")
    error = refused(digits, checkpoint, reweft.MismatchError)
    assert_says(error, checkpoint, "fc.bias", "sparse")


def test_flipped_bit_in_a_storage(
    refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = save(state, tmp_path / "x.pt")
    info = reweft.open(checkpoint)["shift"]  # the last slot but one: others were written to the copy before
    start, nbytes = record_at(checkpoint, f"/data/{info.storage}")
    assert nbytes == 4
    flip(checkpoint, start + 1)
    torch.load(checkpoint)  # torch does not notice
    error = refused(digits, checkpoint, reweft.FormatError)
    assert_says(error, checkpoint, "shift", f"data/{info.storage}", "CRC")
    assert_hints(error)
    assert error.value.path == checkpoint
    assert error.value.key == "shift"


@pytest.mark.parametrize("left", [0.999, 0.5, 0.01])
def test_truncated_checkpoint(
    left: float, refused: Refused, digits: Package, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = save(state, tmp_path / "x.pt")
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(len(data) * left)])
    error = refused(digits, checkpoint, reweft.FormatError)
    assert_says(error, checkpoint)


def test_damaged_weights_of_the_package_are_not_passed_on(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.pt2"
    shutil.copy(digits.path, own)
    start, _ = record_at(own, ".wrapper_weights.blob")
    flip(own, start)
    before = own.read_bytes()
    for out in (own, tmp_path / "new.pt2"):
        with pytest.raises(reweft.FormatError, match="CRC") as error:
            reweft.refit(own, digits_b, out=out)
        assert_says(error, own, "weights.blob")
    with pytest.raises(reweft.FormatError, match="CRC"):
        reweft.verify(own, digits_b)
    with pytest.raises(reweft.FormatError, match="CRC"):
        rt.load(own)
    assert own.read_bytes() == before
    assert not (tmp_path / "new.pt2").exists()


NO_CHECKPOINT = {
    "html": (b"<!DOCTYPE html><html><body>403</body></html>", "HTML"),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "gzip"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "elf": (b"\x7fELF" + bytes(60), "library"),
    "text": (b"hello, world, this is a text file\n", "no checkpoint"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_file_that_is_no_checkpoint_says_what_it_is(
    kind: str, refused: Refused, digits: Package, tmp_path: Path
) -> None:
    content, word = NO_CHECKPOINT[kind]
    checkpoint = tmp_path / "x.pt"
    checkpoint.write_bytes(content)
    error = refused(digits, checkpoint, reweft.UnsupportedError)
    assert_says(error, checkpoint, word)


def test_empty_file(refused: Refused, digits: Package, tmp_path: Path) -> None:
    checkpoint = tmp_path / "x.pt"
    checkpoint.touch()
    refused(digits, checkpoint, reweft.FormatError)


def test_absent_file(refused: Refused, digits: Package, tmp_path: Path) -> None:
    error = refused(digits, tmp_path / "absent.pt", reweft.IoError)
    assert_says(error, tmp_path / "absent.pt")


def test_checkpoint_as_artifact_and_the_other_way_round(digits: Package, digits_b: Path, tmp_path: Path) -> None:
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.refit(digits_b, digits.path, out=tmp_path / "x.pt2")
    assert_says(error, digits.path, "not a checkpoint")
    assert_hints(error)
    with pytest.raises(reweft.UnsupportedError) as error:
        reweft.refit(digits.path, digits.path, out=tmp_path / "x.pt2")
    assert_says(error, digits.path, "not a checkpoint")
    assert_hints(error)
    with pytest.raises(reweft.UnsupportedError):
        rt.load(digits_b)
    assert not (tmp_path / "x.pt2").exists()


def test_weights_of_another_model(refused: Refused, digits: Package, tied: Package, tmp_path: Path) -> None:
    error = refused(digits, save_state(tied.module(1), tmp_path / "x.pt"), reweft.MismatchError)
    assert_says(error, "embedding.weight", "conv1.weight")
