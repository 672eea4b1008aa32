"""Refits by the call that users of Torch-TensorRT know."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from reweft.errors import MismatchError, UsageError
from reweft.torch.compiled import CompiledModule, replace_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["refit_module_weights"]

# Largest difference that passes as rounding, absolute and relative, by the type of the output. Fused kernels round in
# another order than eager ones: 2e-5 was seen for float32 behind BatchNorm. Integers and bools must be equal.
_TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-7,
    torch.complex128: 1e-7,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
# Types of 8 bits.
_COARSE = 0.25


def refit_module_weights(  # noqa: PLR0917  (the peer's signature)
    compiled_module: CompiledModule,
    new_weight_module: torch.nn.Module | ExportedProgram | Mapping[str, torch.Tensor],
    arg_inputs: torch.Tensor | Sequence[Any] | None = None,
    kwarg_inputs: Mapping[str, Any] | None = None,
    verify_output: bool = False,  # noqa: FBT001, FBT002
    use_weight_map_cache: bool = True,  # noqa: FBT001, FBT002
    in_place: bool = False,  # noqa: FBT001, FBT002
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> CompiledModule:
    """Make a model with new weights of a compiled one; Torch-TensorRT's call of this name.

    The compiled module serves on with its old weights meanwhile. The new model shares its program and costs no copy of
    weights but the new ones.

    Args:
        compiled_module: The model.
        new_weight_module: The new weights: a module of the same architecture, its exported program, or a state_dict.
        arg_inputs: Positional inputs to compare outputs on: a tuple, or one tensor.
        kwarg_inputs: Keyword inputs to compare outputs on.
        verify_output: Compare every output of the new model with those of `new_weight_module` before anybody can call
            it. Both run on copies of the inputs, the module as a copy, so that nothing of the caller's changes.
        use_weight_map_cache: Accepted, and without effect: which weight goes where is in the package, nothing has to be
            looked for.
        in_place: Give `compiled_module` the new weights and return it, instead of a new model.
        rtol: Largest relative difference; None means 1e-4 for float32, and what fits other types.
        atol: Largest absolute difference; None means the same.

    Raises:
        MismatchError: The weights do not fit, or an output differs. `compiled_module` keeps its weights.
        UsageError: `verify_output` without inputs, or without a module to compare with.
        RunError: The program failed.

    Example:
        >>> refitted = refit_module_weights(model, net, (x,), verify_output=True)  # doctest: +SKIP
    """
    del use_weight_map_cache
    reference = _reference(new_weight_module) if verify_output else None
    args = (arg_inputs,) if isinstance(arg_inputs, torch.Tensor) else tuple(arg_inputs or ())
    if verify_output and not args and not kwarg_inputs:
        raise UsageError("verify_output needs inputs to compare outputs on", hint="pass arg_inputs or kwarg_inputs")
    refitted = compiled_module._twin()  # noqa: SLF001  (one package)
    replace_weights(refitted, new_weight_module)
    if reference is not None:
        # In one more model: a call may write to buffers, and the new model is to start as its module does.
        found, wanted = (_outputs(one, args, dict(kwarg_inputs or {})) for one in (refitted._twin(), reference))  # noqa: SLF001
        _compare(found, wanted, rtol, atol)
    if not in_place:
        return refitted
    compiled_module._core.adopt(refitted._core)  # noqa: SLF001  (one package)
    return compiled_module


def _reference(weights: object) -> torch.nn.Module:
    if isinstance(weights, ExportedProgram):
        return copy.deepcopy(weights.module())
    if not isinstance(weights, torch.nn.Module):
        raise UsageError(f"verify_output compares with a module or an exported program, not a {type(weights).__name__}")
    if weights.training:
        raise UsageError("the module is in training mode", hint="call module.eval() before the refit")
    return copy.deepcopy(weights)


def _outputs(model: CompiledModule | torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def fresh(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    with torch.no_grad():
        return model(*pytree.tree_map(fresh, args), **pytree.tree_map(fresh, kwargs))


def _compare(found: Any, wanted: Any, rtol: float | None, atol: float | None) -> None:
    """Hold all leaves against each other.

    Raises:
        MismatchError: One differs; the message names it.
    """
    (ours, our_spec), (theirs, their_spec) = (pytree.tree_flatten_with_path(value) for value in (found, wanted))
    if our_spec != their_spec:
        raise MismatchError(f"outputs have the structure {our_spec}, those of the module {their_spec}")
    for (path, one), (_path, other) in zip(ours, theirs, strict=True):
        difference = _difference(one, other, rtol, atol)
        if difference is not None:
            name = f"output{pytree.keystr(path)}"
            hint = "the weights were refitted, so the program computes something else than the module"
            raise MismatchError(f"{name}: {difference}; the old weights stay", hint=hint)


def _difference(one: object, other: object, rtol: float | None, atol: float | None) -> str | None:
    """What makes two leaves differ, if anything."""
    if not isinstance(one, torch.Tensor):
        same = type(one) is type(other) and one == other
        return None if same else f"found {one!r}, the module gives {other!r}"
    if not isinstance(other, torch.Tensor):
        # Numbers come out of compiled programs as tensors of no dimension.
        if not isinstance(other, int | float | complex):
            return f"found a tensor, the module gives a {type(other).__name__}"
        other = torch.tensor(other, dtype=one.dtype)
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"found {one.dtype} {list(one.shape)}, the module gives {other.dtype} {list(other.shape)}"
    if not (one.is_floating_point() or one.is_complex()):
        count = int((one != other).sum())
        return None if count == 0 else f"{count} of {one.numel()} elements differ"
    usual = _TOLERANCES.get(one.dtype, _COARSE)
    wide = torch.complex128 if one.is_complex() else torch.float64
    left, right = one.to(wide), other.to(wide)
    rtol, atol = usual if rtol is None else rtol, usual if atol is None else atol
    close = torch.isclose(left, right, rtol=rtol, atol=atol, equal_nan=True)
    if bool(close.all()):
        return None
    largest = float((left - right).abs()[~close].max())
    return (
        f"{int((~close).sum())} of {one.numel()} elements differ, by up to {largest:.3g} (rtol {rtol:g}, atol {atol:g})"
    )
