"""What other engines' own refit tests assert, on this one: the reference is always eager with the new weights.

The cases are those of Torch-TensorRT's refit and weight-stripping tests and of torch_neuronx's `replace_weights`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as fn

import reweft
import reweft.torch as rt
from models import seeded
from support import assert_same, assert_says, differs, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Conv(nn.Module):
    """The bias is three wide, which AOTInductor would write into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x)
        return out


class ConvNorm(Conv):
    """By default a refit of this by name is silently wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(x))
        return out


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
            if stride > 1 or inner != outer
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(fn.relu(self.bn1(self.conv1(x)))))
        return fn.relu(out + self.downsample(x))


class ResNet18(nn.Module):
    """The eighteen layers, narrow, so that compiling takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (inner, outer) in enumerate(zip((16, *widths), widths, strict=False), 1):
            stride = 1 if number == 1 else 2
            setattr(self, f"layer{number}", nn.Sequential(Block(inner, outer, stride), Block(outer, outer, 1)))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = fn.max_pool2d(fn.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


class Layer(nn.Module):
    """Attention and a feed-forward part, as BERT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm1 = nn.LayerNorm(32)
        self.norm2 = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        mixed = fn.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(mixed))
        out: torch.Tensor = self.norm2(x + self.down(fn.gelu(self.up(x))))
        return out


class Bert(nn.Module):
    """Embeddings, two encoder layers and a head that is tied to the word embedding."""

    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.place = nn.Embedding(16, 32)
        self.norm = nn.LayerNorm(32)
        self.encoder = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("positions", torch.arange(16), persistent=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.words(tokens) + self.place(self.positions[: tokens.shape[1]]))
        x = self.encoder(x)
        return self.head(x), x[:, 0]


class Cumsum(nn.Module):
    """Operations between the weights that no weight belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cumsum(self.conv(x), 2).pow(2).mean((2, 3))
        return torch.cumsum(self.fc(x), 1)


class DualComplex(nn.Module):
    """Two complex buffers of one shape, and a real parameter."""

    left: torch.Tensor
    right: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", torch.randn(4, dtype=torch.complex64))
        self.register_buffer("right", torch.randn(4, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real((x * self.scale).to(torch.complex64) * self.left + self.right)


class Scaled(nn.Module):
    """Scaled by an attribute without dimensions that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scale = torch.randn(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x) * self.scale
        return out


class Several(nn.Module):
    """Several results of which the first depends on one weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.second(x)


def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


CASES: dict[type[nn.Module], Callable[[], torch.Tensor]] = {
    Conv: image,
    ConvNorm: image,
    ResNet18: lambda: torch.randn(1, 3, 32, 32),
    Bert: lambda: torch.randint(50, (2, 8)),
    Cumsum: image,
    DualComplex: lambda: torch.randn(3, 4),
    Scaled: lambda: torch.randn(3, 4),
    Several: lambda: torch.randn(3, 4),
}


@pytest.fixture(scope="module", params=list(CASES), ids=lambda kind: kind.__name__)
def traced(request: pytest.FixtureRequest) -> tuple[type[nn.Module], torch.Tensor, rt.CompiledModule]:
    x = CASES[request.param]()
    return request.param, x, rt.trace(seeded(request.param, 0), x)


def eager(kind: type[nn.Module], seed: int, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return seeded(kind, seed)(x)


def test_every_weight_is_mapped(traced: Any) -> None:
    kind, _, model = traced
    found = {name for names in model.slots() for name in names} | set(model.refittable().unused)
    assert found >= set(seeded(kind, 0).state_dict())
    assert model.refittable().unrefittable == {}


def test_refit_gives_the_outputs_of_the_new_module(traced: Any) -> None:
    kind, x, model = traced
    before = model(x)
    for verify in (False, True):
        new = rt.refit_module_weights(model, seeded(kind, 1), arg_inputs=(x,), verify_output=verify)
        torch.testing.assert_close(new(x), eager(kind, 1, x), rtol=1e-4, atol=1e-4)
    # The model that was given stays as it was.
    assert_same(model(x), before)
    assert differs(new(x), before)


def test_refit_after_save_and_load(traced: Any, tmp_path: Path) -> None:
    kind, x, model = traced
    rt.save(model, tmp_path / "net.pt2")
    loaded = rt.load(tmp_path / "net.pt2")
    rt.refit_module_weights(loaded, seeded(kind, 1), arg_inputs=(x,), verify_output=True, in_place=True)
    torch.testing.assert_close(loaded(x), eager(kind, 1, x), rtol=1e-4, atol=1e-4)


def test_stripped_and_refitted_twice(traced: Any, tmp_path: Path) -> None:
    kind, x, model = traced
    rt.save(model, tmp_path / "net.pt2")
    reweft.strip(tmp_path / "net.pt2", tmp_path / "stripped")
    for seed in (1, 2):
        module = seeded(kind, seed)
        loaded = rt.load(tmp_path / "stripped", weights=module)
        torch.testing.assert_close(loaded(x), eager(kind, seed, x), rtol=1e-4, atol=1e-4)
    rt.replace_weights(loaded, seeded(kind, 1))
    torch.testing.assert_close(loaded(x), eager(kind, 1, x), rtol=1e-4, atol=1e-4)


def test_there_and_back_is_exact(traced: Any) -> None:
    kind, x, model = traced
    rt.replace_weights(model, seeded(kind, 0))
    before, version = model(x), model.weights_version
    rt.replace_weights(model, seeded(kind, 1))
    assert model.weights_version != version
    rt.replace_weights(model, seeded(kind, 0))
    assert model.weights_version == version
    assert_same(model(x), before)


def test_wrong_weights_change_nothing(traced: Any, tmp_path: Path) -> None:
    kind, x, model = traced
    before, state = model(x), seeded(kind, 1).state_dict()
    unused = set(model.refittable().unused)
    key = next(key for key in state if key not in unused)
    missing = {name: value for name, value in state.items() if value.data_ptr() != state[key].data_ptr()}
    wrong = {**state, **{name: torch.zeros(7, 7) for name in state if state[name].data_ptr() == state[key].data_ptr()}}
    for bad in (missing, wrong, {**state, "another": torch.zeros(3, 3)}):
        with pytest.raises(reweft.MismatchError):
            rt.refit_module_weights(model, bad, in_place=True)
        assert_same(model(x), before)
    path = save(state, tmp_path / "x.pt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(reweft.ReweftError) as error:
        rt.replace_weights(model, path)
    assert_says(error, path)
    assert_same(model(x), before)


def test_a_wrong_result_behind_the_first_is_found() -> None:
    """The module to compare with computes the first result alike and the second one otherwise."""

    class Other(Several):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.first(x), self.second(x) + 1

    x = torch.randn(3, 4)
    model = rt.trace(seeded(Several, 0), x)
    before = model(x)
    with pytest.raises(reweft.MismatchError):
        rt.refit_module_weights(model, seeded(Other, 1), arg_inputs=(x,), verify_output=True, in_place=True)
    assert_same(model(x), before)
