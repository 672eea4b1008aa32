"""`dynamic_batch`: every size is answered as the module answers it, or the model is refused."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import models
import reweft
import reweft.torch as rt
from support import assert_hints, assert_same, assert_says, beside

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 4


class Pair(nn.Module):
    """Two inputs, several results, one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.embedding = nn.Embedding(20, 6)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> Any:
        y = self.fc(x + self.embedding(tokens))
        return {"y": y, "nothing": None, "rows": (y.softmax(-1), tokens)}


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 6), torch.randint(20, (rows,))


@pytest.fixture(scope="module")
def pair() -> rt.CompiledModule:
    model = rt.trace(models.seeded(Pair, 0), inputs(SIZE))
    assert rt.dynamic_batch(model) is model
    return model


@pytest.mark.parametrize("rows", [0, 1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 1])
def test_every_size_is_answered_as_by_the_module(pair: rt.CompiledModule, rows: int) -> None:
    for seed in (0, 1):
        module, given = models.seeded(Pair, seed), inputs(rows)
        rt.replace_weights(pair, module)
        with torch.no_grad():
            torch.testing.assert_close(pair(*given), module(*given))


def test_inputs_of_different_batches_are_refused(pair: rt.CompiledModule) -> None:
    with pytest.raises(ValueError, match="tokens") as error:
        pair(torch.randn(3, 6), torch.randint(20, (2,)))
    for part in ("dim 0 is 2", '"x"' if '"x"' in str(error.value) else "'x'", "is 3"):
        assert part in str(error.value)


def test_another_dimension_is_refused(pair: rt.CompiledModule) -> None:
    with pytest.raises(ValueError, match="dim 1 is 7, the program takes 6"):
        pair(torch.randn(3, 7), torch.randint(20, (3,)))


def test_it_survives_save_and_load(pair: rt.CompiledModule, tmp_path: Path) -> None:
    rt.save(pair, tmp_path / "x.pt2")
    loaded, given = rt.load(tmp_path / "x.pt2", replicas=2), inputs(2 * SIZE + 1)
    assert_same(loaded(*given), pair(*given))
    assert_same(torch._inductor.aoti_load_package(str(tmp_path / "x.pt2"))(*inputs(SIZE))["nothing"], None)


class Whole(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Clip(nn.Module):
    """Logits of every row against every other, as CLIP gives them."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).t()


class Swallowed(nn.Module):
    """Rows influence each other only where values are large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(x.mean(0) - 100)


class Placed(nn.Module):
    """A weight for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(SIZE, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.rows


class Hidden(nn.Module):
    """Rows influence each other as soon as a refit brings a weight that is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix * x.mean(0)


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x * 2, x.sum()


class Sized(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x * 2, x.shape[0]


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.t()


@pytest.mark.parametrize(
    ("kind", "shapes", "why"),
    [
        (Whole, [(SIZE, 6)], "rows influence each other"),
        (Clip, [(SIZE, 6), (SIZE, 6)], "rows influence each other"),
        (Swallowed, [(SIZE, 6)], "rows influence each other"),
        (Placed, [(SIZE, 6)], "where they stand"),
        (Hidden, [(SIZE, 6)], "rows influence each other"),
        (Hidden, [(1, 6)], "rows influence each other"),
        (Scalar, [(SIZE, 6)], "not the batch"),
        (Sized, [(SIZE, 6)], "is a number"),
        (Turned, [(SIZE, SIZE)], "rows influence each other"),
        (models.Counter, [(SIZE,)], "writes to"),
        (Clip, [(SIZE, 6), (SIZE + 1, 6)], "all inputs must have the batch"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_model_that_chunks_would_answer_wrongly_is_refused(
    kind: type[nn.Module], shapes: list[tuple[int, ...]], why: str
) -> None:
    given = tuple(torch.randn(shape) for shape in shapes)
    module = models.seeded(kind, 0)
    model = rt.trace(module, given)
    with pytest.raises(reweft.UnsupportedError, match=why):
        rt.dynamic_batch(model)
    # It goes on as before.
    model(*given)


def test_batch_of_one_is_tried_with_the_module() -> None:
    one = (torch.randn(1, 6), torch.randn(1, 6))
    module = Clip().eval()
    model = rt.trace(module, one)
    with pytest.raises(reweft.UnsupportedError, match="influence"):
        rt.dynamic_batch(model)
    good = models.seeded(models.Small, 0)
    single = rt.trace(good, torch.randn(1, 16))
    rt.dynamic_batch(single)
    given = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(single(given), good(given))


def test_batch_of_one_without_the_module_is_refused(tmp_path: Path) -> None:
    module = models.seeded(models.Small, 0)
    rt.save(rt.trace(module, torch.randn(1, 16)), tmp_path / "x.pt2")
    model = rt.load(tmp_path / "x.pt2")
    with pytest.raises(reweft.UsageError, match="batch of one") as error:
        rt.dynamic_batch(model)
    assert_hints(error)
    rt.dynamic_batch(model, reference=module)
    given = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(given), module(given))


def test_tokens_of_a_loaded_model_must_be_given(tmp_path: Path) -> None:
    rt.save(rt.trace(models.seeded(Pair, 0), inputs(SIZE)), tmp_path / "x.pt2")
    model = rt.load(tmp_path / "x.pt2")
    with pytest.raises(reweft.UsageError, match="tokens") as error:
        rt.dynamic_batch(model)
    assert_hints(error)
    alike = (torch.zeros(SIZE, 6), torch.zeros(SIZE, dtype=torch.int64))
    rt.dynamic_batch(model, example_inputs=inputs(SIZE))
    assert model(*inputs(7))["y"].shape == (7, 5)
    assert alike[0].shape == (SIZE, 6)


def test_size_that_varies_already_is_refused() -> None:
    batch = {0: torch.export.Dim("batch", min=2, max=8)}
    model = rt.trace(models.seeded(models.Small, 0), torch.randn(4, 16), dynamic_shapes=(batch,))
    with pytest.raises(reweft.UsageError, match="vary already"):
        rt.dynamic_batch(model)


def test_an_answer_is_of_one_set_of_weights() -> None:
    """Chunks of one call must not see old and new weights."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0 + self.value

    model = rt.dynamic_batch(rt.trace(Constant().eval(), torch.randn(2, 64)))
    versions = itertools.count(1)
    with beside(lambda: rt.replace_weights(model, {"value": torch.full((64,), float(next(versions)))})):
        for _ in range(300):
            assert len(model(torch.ones(17, 64)).unique()) == 1


def test_messages_name_what_differs(pair: rt.CompiledModule) -> None:
    with pytest.raises(reweft.MismatchError) as error:
        pair(torch.randn(3, 6, 1), torch.randint(20, (3,)))
    assert_says(error, "x", "3 dimensions", "takes 2")
