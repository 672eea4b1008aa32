"""Operators that a program leaves to its host. The references are eager, and the same package in torch's own runner."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import reweft
import reweft.torch as rt
from models import seeded
from support import child, with_record

if TYPE_CHECKING:
    from pathlib import Path

# torch says of each such operator of its own that it goes this way.
pytestmark = pytest.mark.filterwarnings("ignore:.*c-shim implementation")


@torch.library.custom_op("reweft_tests::mix", mutates_args=())
def mix(
    x: torch.Tensor,
    others: list[torch.Tensor],
    count: int,
    scale: float,
    sizes: list[int],
    *,
    mode: str = "sum",
    dtype: torch.dtype | None = None,
    flag: bool = False,
) -> torch.Tensor:
    made = x * count + torch.stack(others).sum(0) * scale + float(flag) + len(mode) + sum(sizes)
    return made.to(dtype or x.dtype)


@mix.register_fake
def _mixed(x: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    assert args
    assert kwargs.keys() <= {"mode", "flag"}
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("reweft_tests::add_in_place", mutates_args={"x"})
def add_in_place(x: torch.Tensor, by: int) -> None:
    x.add_(by)


@torch.library.custom_op("reweft_tests::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    if (x < 0).any():
        raise ValueError("an element is negative")
    return x.clone()


@positive.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("reweft_tests::rows", mutates_args=())
def rows(x: torch.Tensor) -> list[torch.Tensor]:
    return [row.clone() for row in x[: int(x[0, 0])]]


@rows.register_fake
def _(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(row) for row in x]


class OfTorch(nn.Module):
    """Operators of torch's own that have no C function: results in tuples, optional arguments, none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(8) + torch.rand(8, 8))
        self.filter = nn.Parameter(torch.rand(5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        solved = torch.linalg.solve(self.matrix, x)
        values, indices = torch.median(solved, dim=0)
        wave = torch.fft.irfft(torch.fft.rfft(solved.t()) * self.filter, n=8)
        return values, indices, wave


class OfOurs(nn.Module):
    """Custom operators: arguments of each kind, one that writes, numbers that vary with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ops = torch.ops.reweft_tests
        scaled = x * self.weight
        ops.add_in_place(scaled, x.shape[0])
        half = ops.mix(scaled, [x, scaled], 3, 0.5, [1], flag=True, mode="other", dtype=torch.float16)
        sized = ops.mix(x, [x], x.shape[0], 2, [x.shape[0], 7, x.shape[1]])
        return scaled, half, sized


class Picky(nn.Module):
    """An operator that does not take everything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.ops.reweft_tests.positive(x * self.weight)
        return made + 1


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(torch.softmax(x * self.weight, -1), 3)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [row + 1 for row in torch.ops.reweft_tests.rows(x * self.weight)]


def traced(folder: pytest.TempPathFactory, kind: type[nn.Module], x: torch.Tensor, **how: Any) -> Path:
    path = folder.mktemp("operators") / "model.pt2"
    rt.save(rt.trace(seeded(kind, 0), (x,), **how), path)
    return path


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory, OfTorch, torch.rand(8, 8))


@pytest.fixture(scope="module")
def of_ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {"x": {0: Dim("batch", min=2, max=64)}}
    return traced(tmp_path_factory, OfOurs, torch.rand(5, 4), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def picky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory, Picky, torch.ones(2, 4))


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-4, atol=1e-4)


def equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(list(found), list(wanted), rtol=0, atol=0)


def test_operators_of_torch_give_what_eager_gives_before_and_after_a_refit(of_torch: Path) -> None:
    model, x = rt.load(of_torch), torch.rand(8, 8)
    stock = torch._inductor.aoti_load_package(str(of_torch))
    for seed in (0, 1, 0):
        other = seeded(OfTorch, seed)
        rt.replace_weights(model, other)
        stock.load_constants(dict(other.named_parameters()), check_full_update=True)
        with torch.no_grad():
            close(model(x), other(x))
        equal(model(x), stock(x))


def test_arguments_of_every_kind_reach_custom_operators(of_ours: Path) -> None:
    model = rt.load(of_ours)
    stock = torch._inductor.aoti_load_package(str(of_ours))
    for batch in (2, 5, 64):
        x = torch.rand(batch, 4)
        with torch.no_grad():
            close(model(x), seeded(OfOurs, 0)(x))
        equal(model(x), stock(x))


def test_two_weights_are_never_mixed_in_calls_beside_refits(of_ours: Path) -> None:
    model, x = rt.load(of_ours, replicas=2), torch.rand(5, 4)
    modules = [seeded(OfOurs, seed) for seed in (0, 1)]
    wanted = []
    for module in modules:
        rt.replace_weights(model, module)
        wanted.append(model(x))
    found: list[Any] = []

    def serve() -> None:
        found.extend(model(x) for _ in range(200))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        rt.replace_weights(model, modules[number % 2])
    for thread in threads:
        thread.join()
    assert len(found) == 600
    for outputs in found:
        assert any(all(map(torch.equal, outputs, either)) for either in wanted)


def test_random_operators_draw_what_eager_draws(tmp_path_factory: pytest.TempPathFactory) -> None:
    x = torch.rand(9)
    model = rt.load(traced(tmp_path_factory, Drawn, x))
    for seed in range(3):
        torch.manual_seed(seed)
        found = model(x)
        torch.manual_seed(seed)
        assert torch.equal(found, seeded_without_drawing(Drawn, x, seed))


def seeded_without_drawing(kind: type[nn.Module], x: torch.Tensor, seed: int) -> torch.Tensor:
    """Eager with the weights of seed 0 and the random numbers of another."""
    module = seeded(kind, 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        made: torch.Tensor = module(x)
    return made


def test_failure_of_an_operator_is_the_calls_and_the_model_works_on(picky: Path) -> None:
    model = rt.load(picky, replicas=2)
    for _ in range(100):
        with pytest.raises(
            reweft.RunError, match="operator reweft_tests::positive failed: ValueError: an element"
        ) as error:
            model(-torch.ones(2, 4))
        assert isinstance(error.value.__cause__, ValueError)
        assert torch.equal(model(torch.ones(2, 4)), torch.full((2, 4), 2.0))


def test_failure_in_one_thread_is_not_told_to_another(picky: Path) -> None:
    model, wrong = rt.load(picky, replicas=2), list[str]()

    def serve(x: torch.Tensor, fails: bool) -> None:  # noqa: FBT001
        for _ in range(200):
            try:
                model(x)
            except reweft.RunError:
                if not fails:
                    wrong.append("failed")
            else:
                if fails:
                    wrong.append("passed")

    threads = [threading.Thread(target=serve, args=(sign * torch.ones(2, 4), sign < 0)) for sign in (1, -1, 1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_interrupt_in_an_operator_is_not_an_error_of_the_model(picky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rt.load(picky)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("reweft.torch.operators._Node.run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(2, 4))
    assert torch.equal(model(torch.ones(2, 4)), torch.full((2, 4), 2.0))


def test_operator_that_refits_or_calls_its_own_model_is_refused(picky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, module = rt.load(picky), seeded(Picky, 0)
    for job in (lambda: rt.replace_weights(model, module), lambda: model(torch.ones(2, 4))):
        with monkeypatch.context() as patched:
            patched.setattr("reweft.torch.operators._Node.run", lambda *_, job=job: job())
            with pytest.raises(reweft.RunError) as error:
                model(torch.ones(2, 4))
        assert isinstance(error.value.__cause__, reweft.UsageError)
    assert torch.equal(model(torch.ones(2, 4)), torch.full((2, 4), 2.0))


def test_autocast_and_gradients_of_the_caller_change_nothing(of_torch: Path) -> None:
    model, x = rt.load(of_torch), torch.rand(8, 8)
    wanted = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        equal(model(x), wanted)
    found = model(x.clone().requires_grad_())
    equal(found, wanted)
    assert not any(value.requires_grad for value in found)


def test_other_number_of_results_than_compiled_for_is_an_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    x = torch.full((3, 3), 3.0)
    model = rt.load(traced(tmp_path_factory, Rows, x))
    equal(model(x), [row + 1 for row in x])
    with pytest.raises(reweft.RunError, match="result 0 of operator reweft_tests::rows is another"):
        model(torch.full((3, 3), 2.0))


def test_chunks_run_operators_on_all_replicas(picky: Path) -> None:
    model = rt.dynamic_batch(rt.load(picky, replicas=2), example_inputs=(torch.rand(2, 4) + 1e6,))
    x = torch.rand(7, 4)
    assert torch.equal(model(x), x + 1)
    with pytest.raises(reweft.RunError, match="an element is negative"):
        model(-x)


WITHOUT_THE_MODULE = """
import sys
import reweft
import reweft.torch as rt
try:
    rt.load(sys.argv[1])
except reweft.UnsupportedError as error:
    assert "reweft_tests::positive" in str(error), error
    assert "import the module" in error.hint
    assert str(error.path) == sys.argv[1]
    print("refused")
"""


def test_operator_that_this_process_does_not_have_is_refused_by_name(picky: Path) -> None:
    ended = child(WITHOUT_THE_MODULE, picky)
    assert ended.stdout == "refused\n", ended.stderr


def test_damaged_list_of_operators_is_a_format_error(picky: Path, tmp_path: Path) -> None:
    broken = with_record(picky, tmp_path / "broken.pt2", ".wrapper.json", lambda text: text[: len(text) // 2])
    with pytest.raises(reweft.FormatError, match="operators of the host"):
        rt.load(broken)
