"""Any batch size on a program that was compiled for one: chunks, the last of them padded, on all replicas."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from reweft.errors import UnsupportedError, UsageError
from reweft.torch.calling import Batches
from reweft.torch.compiled import CompiledModule, replace_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["dynamic_batch"]

# Rows that are changed one by one to see whether others change; with more rows, these are spread over them.
_PROBED_ROWS = 8
# What a row is changed to: another row's values, large ones, none at all.
_DISTURBANCES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda row: row.flip(-1) + 1 if row.dim() else row + 1,
    lambda row: row * 1e3 + 1e3,
    lambda row: torch.full_like(row, float("nan")),
)


# What the order of sums may make of a row; other types have torch's own tolerances.
_ROUNDING = {torch.float32: 1e-4, torch.complex64: 1e-4}


def dynamic_batch(
    model: CompiledModule,
    *,
    example_inputs: torch.Tensor | tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    reference: torch.nn.Module | Callable[..., Any] | None = None,
) -> CompiledModule:
    """Let a model take any batch size along the first dimension of its inputs.

    A call is cut into chunks of the size that the model was compiled for; the last is padded with its last row, and
    what the padding gives is cut off. Chunks run on all replicas at once, on one set of weights. `save` writes it down.

    Whether a batch may be cut is found out by running the program: rows must not influence each other, nor depend on
    where they stand. A program that fails that is refused, since chunks would answer wrongly.

    Args:
        model: The model; it is changed.
        example_inputs: Arguments to try it with, as for `trace`. None takes those that it was traced with, or random
            ones if it was loaded and takes floats only.
        kwargs: Keyword arguments to try it with.
        reference: The module, for a model that was compiled for a batch of one: such a program cannot show what rows do
            to each other. None takes the module that was traced, if it is there still.

    Returns:
        The model.

    Raises:
        UsageError: The batch varies already, there is nothing to try the program with, or a batch of one needs
            `reference`.
        UnsupportedError: Chunks would answer wrongly; the message says why.
    """
    size = _batch_size(model)
    leaves = _examples(model, example_inputs, kwargs or {})
    _Rows(model, size).check(leaves)
    if model.slots():
        # Weights that happen to be zero hide what rows do to each other, and a refit may bring others.
        _Rows(_with_other_weights(model), size).check(leaves)
    if size == 1:
        _check_reference(model, reference, leaves)
    model._batches = Batches(model._call)  # noqa: SLF001  (one package)
    return model


def _batch_size(model: CompiledModule) -> int:
    """The first dimension of all inputs.

    Raises:
        UsageError: It varies already.
        UnsupportedError: There is no such dimension, or the program keeps a state.
    """
    inputs = model._call.inputs  # noqa: SLF001  (one package)
    if not inputs:
        raise UnsupportedError("the program has no inputs, so there is no batch to cut")
    for item in inputs:
        if not item.shape:
            raise UnsupportedError(f"input {item.name!r} has no dimensions, so it cannot be cut into chunks")
        if not all(isinstance(size, int) for size in item.shape):
            raise UsageError(f"input {item.name!r} has sizes that vary already", hint="call the model with any of them")
        if item.shape[0] != inputs[0].shape[0]:
            found = (
                f"dim 0 of input {item.name!r} is {item.shape[0]}, that of {inputs[0].name!r} is {inputs[0].shape[0]}"
            )
            raise UnsupportedError(f"{found}; all inputs must have the batch there")
        if item.mutated:
            raise UnsupportedError(f"the program writes to input {item.name!r}, which padding would change")
    if written := model._core.written():  # noqa: SLF001  (one package)
        raise UnsupportedError(
            f"the program writes to {written[0]!r}, once for each chunk instead of once for the batch"
        )
    return int(inputs[0].shape[0])


def _examples(model: CompiledModule, example: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Inputs to try the program with, whose rows differ.

    Raises:
        UsageError: There are none, or all their rows are alike.
    """
    call = model._call  # noqa: SLF001  (one package)
    if example is not None:
        given = call.tensors(example if isinstance(example, tuple) else (example,), kwargs)
    elif model._examples is not None:  # noqa: SLF001  (one package)
        given = model._examples  # noqa: SLF001
    elif all(item.is_float for item in call.inputs):
        given = [torch.randn(item.shape).to(item.torch_dtype) for item in call.inputs]
    else:
        name = next(item.name for item in call.inputs if not item.is_float)
        raise UsageError(f"nothing says which values input {name!r} may have", hint="pass example_inputs= as for trace")
    rows = [_distinct(item, value) for item, value in zip(call.inputs, given, strict=True)]
    if rows[0].shape[0] > 1 and all(torch.equal(value[0:1].expand_as(value), value) for value in rows):
        raise UsageError("all rows of the examples are the same, which shows nothing", hint="pass rows that differ")
    return rows


def _distinct(item: Any, value: torch.Tensor) -> torch.Tensor:
    """Examples whose rows differ, where the dtype lets values be made up."""
    if not item.is_float:
        return value.clone()
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
    return value + noise


def _other(value: torch.Tensor) -> torch.Tensor:
    """Values between 0.5 and 1.5 for floats: neither zero nor negative, which roots and divisions mind."""
    if not value.is_floating_point() and not value.is_complex():
        return value
    made = torch.rand(value.shape, generator=torch.Generator().manual_seed(value.numel())) + 0.5
    return made.to(value.dtype)


def _with_other_weights(model: CompiledModule) -> CompiledModule:
    """A second model of the program with weights that hide nothing."""
    other = model._twin()  # noqa: SLF001  (one package)
    known, made = model.state_dict(), dict[str, torch.Tensor]()
    for names, dtype, shape in model._core.tensors():  # noqa: SLF001
        # What was folded has no value to be read.
        value = known[names[0]] if names[0] in known else torch.ones(shape, dtype=getattr(torch, dtype))
        made.update(dict.fromkeys(names, _other(value)))
    replace_weights(other, made)
    return other


class _Rows:
    """What the rows of a batch do to each other, by running the program."""

    def __init__(self, model: CompiledModule, size: int) -> None:
        self._model = model
        self._size = size

    def check(self, leaves: list[torch.Tensor]) -> None:
        """Hold the results to this: they have a row for each row of the inputs, which depends on that row alone.

        Raises:
            UnsupportedError: They have not.
        """
        wanted = self._run(leaves)
        self._check_results(wanted)
        if not _same(wanted, self._run(leaves)):
            raise UnsupportedError("the program is random: two calls with the same inputs differ")
        if self._size > 1:
            for row in sorted({round(i * (self._size - 1) / (_PROBED_ROWS - 1)) for i in range(_PROBED_ROWS)}):
                self._check_row(leaves, wanted, row)
            self._check_order(leaves, wanted)

    def _run(self, leaves: list[torch.Tensor]) -> list[Any]:
        call = self._model._call  # noqa: SLF001  (one package)
        fitted = [item.fit(leaf, item.shape, item.strides) for item, leaf in zip(call.inputs, leaves, strict=True)]
        found: list[Any] = self._model._run_chunks([fitted])[0]  # noqa: SLF001  (one package)
        return found

    def _check_results(self, found: list[Any]) -> None:
        """Hold the results to this: tensors have the batch in dim 0, and what is none does not follow from it.

        Raises:
            UnsupportedError: They do not.
        """
        outputs = self._model._call.outputs  # noqa: SLF001  (one package)
        for number, (value, stated) in enumerate(zip(found, outputs, strict=True)):
            if stated == "tensor":
                if not value.dim() or value.shape[0] != self._size:
                    shape = list(value.shape)
                    what = f"result {number} has the shape {shape}, whose dim 0 is not the batch of {self._size}"
                    raise UnsupportedError(what)
            elif stated == "number" or stated["constant"]["type"] in {"int", "float"}:
                raise UnsupportedError(f"result {number} is a number, which may follow from the batch")
        if "tensor" not in outputs:
            raise UnsupportedError("no result is a tensor")

    def _check_row(self, leaves: list[torch.Tensor], wanted: list[Any], row: int) -> None:
        """Hold the results to this: whatever becomes of one row of the inputs, all other rows keep their bits.

        Raises:
            UnsupportedError: They do not.
        """
        others = [index for index in range(self._size) if index != row]
        for disturb in (_swapped(row), *map(_in_row(row), _DISTURBANCES)):
            found = self._run([disturb(leaf) for leaf in leaves])
            for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
                if isinstance(one, torch.Tensor) and not _same([one[others]], [other[others]]):
                    raise UnsupportedError(
                        f"rows influence each other: row {row} of the inputs changes other rows of result {number}",
                        hint="compile the model with a dynamic batch (dynamic_shapes), or for the batch that it gets",
                    )

    def _check_order(self, leaves: list[torch.Tensor], wanted: list[Any]) -> None:
        """Hold the results to this: rows do not depend on where they stand.

        Raises:
            UnsupportedError: They do.
        """
        found = self._run([leaf.roll(1, 0) for leaf in leaves])
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            if isinstance(one, torch.Tensor) and not _close(one.roll(1, 0), other):
                raise UnsupportedError(f"rows depend on where they stand: result {number} differs when they are moved")


def _swapped(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Puts the next row's values into a row: of any dtype these are values that the program takes."""

    def disturb(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        changed[row] = value[(row + 1) % value.shape[0]]
        return changed

    return disturb


def _in_row(row: int) -> Callable[[Callable[[torch.Tensor], torch.Tensor]], Callable[[torch.Tensor], torch.Tensor]]:
    """Applies a disturbance to one row of inputs whose values may be made up."""

    def wrap(disturb: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def disturbed(value: torch.Tensor) -> torch.Tensor:
            if not value.dtype.is_floating_point and not value.dtype.is_complex:
                return value
            changed = value.clone()
            changed[row] = disturb(value[row])
            return changed

        return disturbed

    return wrap


def _check_reference(model: CompiledModule, reference: Any, leaves: list[torch.Tensor]) -> None:
    """Hold the module's answer for two rows at once against those for each alone.

    Raises:
        UsageError: There is no module.
        UnsupportedError: They differ.
    """
    module = reference if reference is not None else model._traced()  # noqa: SLF001  (one package)
    if module is None:
        raise UsageError(
            "the model was compiled for a batch of one, which cannot show what rows do to each other",
            hint="pass reference= the module, or compile it for a batch of two or more",
        )
    call = model._call  # noqa: SLF001  (one package)
    other = [leaf.roll(1, -1) if leaf.dim() > 1 else leaf for leaf in leaves]
    other = [leaf + 1 if item.is_float else leaf for item, leaf in zip(call.inputs, other, strict=True)]
    joined = [torch.cat(pair) for pair in zip(leaves, other, strict=True)]
    modules = [module]
    if isinstance(module, torch.nn.Module):
        modules.append(copy.deepcopy(module))
        for value in (*modules[1].parameters(), *modules[1].buffers()):
            value.data.copy_(_other(value.data))
    for one in modules:
        with torch.no_grad():
            both, alone = _answers(call, one, joined), [_answers(call, one, rows) for rows in (leaves, other)]
        for number, (found, *parts) in enumerate(zip(both, *alone, strict=True)):
            if not isinstance(found, torch.Tensor):
                continue
            if found.dim() == 0 or found.shape[0] != 2 or not _close(found, torch.cat(parts)):  # noqa: PLR2004  (rows)
                raise UnsupportedError(
                    f"rows influence each other: result {number} for two rows is not that of each alone",
                    hint="compile the model with a dynamic batch (dynamic_shapes), or for the batch that it gets",
                )


def _answers(call: Any, module: Any, tensors: list[torch.Tensor]) -> list[Any]:
    args, kwargs = call.structured(tensors)
    return pytree.tree_leaves(module(*args, **kwargs))


def _same(left: list[Any], right: list[Any]) -> bool:
    """Bit for bit."""
    pairs: Iterator[tuple[Any, Any]] = zip(left, right, strict=True)
    return all(not isinstance(one, torch.Tensor) or _bits(one) == _bits(other) for one, other in pairs)


def _bits(value: torch.Tensor) -> bytes:
    held = value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return held.view(torch.uint8).numpy().tobytes() if held.numel() else b""


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Within rounding: the order in which sums are made may follow from the row."""
    try:
        rounding = _ROUNDING.get(left.dtype)
        torch.testing.assert_close(left, right, rtol=rounding, atol=rounding, equal_nan=True)
    except AssertionError:
        return False
    return True
