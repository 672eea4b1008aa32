"""Functions as modules, so that what they compute with has names."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from reweft.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Function", "as_module"]


class Function(torch.nn.Module):
    """A function, and the modules and tensors that it refers to, each under the name that it has there."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        for name, value in _referred(func):
            # A name that every module has already would hide what the module needs.
            held = f"{name}_" if hasattr(self, name) else name
            setattr(self, held, value)

        @functools.wraps(func)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

        self.forward = forward


def as_module(func: Callable[..., Any]) -> torch.nn.Module:
    """A module that computes what `func` does.

    Modules are given back as they are; a method of a module gives the module with that method for `forward`.

    Raises:
        UsageError: It cannot be called.
    """
    if isinstance(func, torch.nn.Module):
        return func
    if not callable(func):
        raise UsageError(f"{type(func).__name__} is neither a module nor a function")
    if isinstance(func, types.MethodType) and isinstance(func.__self__, torch.nn.Module):
        module = copy.copy(func.__self__)
        module.forward = types.MethodType(func.__func__, module)
        return module
    return Function(func)


def _referred(func: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Modules, tensors and containers of them that a function refers to, by the names it has for them."""
    if isinstance(func, functools.partial):
        bound = inspect.signature(func.func).bind_partial(*func.args, **func.keywords)
        yield from ((name, value) for name, value in bound.arguments.items() if _matters(value))
        func = func.func
    owner = getattr(func, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        yield from ((name, value) for name, value in vars(owner).items() if _matters(value))
    function = getattr(func, "__func__", func)
    if not isinstance(function, types.FunctionType):
        call = vars(type(func)).get("__call__")
        if not isinstance(call, types.FunctionType):
            return
        yield from ((name, value) for name, value in vars(func).items() if _matters(value))
        function = call
    names = inspect.getclosurevars(function)
    for found in (names.nonlocals, names.globals):
        yield from ((name, value) for name, value in found.items() if _matters(value))
    defaults = inspect.signature(function).parameters.values()
    yield from ((item.name, item.default) for item in defaults if _matters(item.default))


def _matters(value: object) -> bool:
    """Whether a program could compute with it."""
    if isinstance(value, torch.Tensor | torch.nn.Module):
        return True
    if not isinstance(value, list | tuple | dict):
        return False
    return any(isinstance(leaf, torch.Tensor | torch.nn.Module) for leaf in pytree.tree_leaves(value))
