"""How a module looks before something is done to it that may fail, and how it is put back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import torch

from reweft.errors import UnsupportedError

__all__ = ["Undo"]

# Containers of modules that loading code may change in place: parameters, buffers, children, hooks.
_CONTAINERS = (dict, OrderedDict, list, set)


class Undo:
    """The objects of a module and of all below it, the elements of its tensors, and its extra state.

    Args:
        module: The module.
        values: Keep the elements of its tensors, which costs a copy of them; next to nothing without.
        needed: Refuse tensors that cannot be copied; otherwise only their objects are put back.

    Raises:
        UnsupportedError: A subclass cannot be copied, and `needed`.
    """

    def __init__(self, module: torch.nn.Module, *, values: bool, needed: bool) -> None:
        parts = list(module.modules())
        self._parts = [_Part(part) for part in parts]
        held = [value for part in parts for value in (*part._parameters.values(), *part._buffers.values())]  # noqa: SLF001
        unique = {id(value): value for value in held if value is not None}
        self._tensors = [_Tensor(value, values=values, needed=needed) for value in unique.values()]

    def restore(self) -> None:
        """Put everything back that was there."""
        for part in self._parts:
            part.restore_extra()
        for part in self._parts:
            part.restore()
        with torch.no_grad():
            for tensor in self._tensors:
                tensor.restore()


class _Part:
    """One module without its tensors' elements."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.attributes = dict(vars(module))
        containers = [value for value in self.attributes.values() if type(value) in _CONTAINERS]
        self.containers = [(value, copy.copy(value)) for value in containers]
        self.extra: Any = None
        self.has_extra = self.kind.set_extra_state is not torch.nn.Module.set_extra_state
        if self.has_extra:
            try:
                self.extra = copy.deepcopy(module.get_extra_state())
            except Exception:  # noqa: BLE001  (what has no state to give has its attributes alone)
                self.has_extra = False

    def restore_extra(self) -> None:
        if self.has_extra:
            # What it raises must not keep the rest from being put back; attributes are restored in any case.
            with suppress(Exception):
                self.module.set_extra_state(self.extra)

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for container, before in self.containers:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)


class _Tensor:
    """One tensor: its object, what the object stands for, and its elements."""

    def __init__(self, tensor: torch.Tensor, *, values: bool, needed: bool) -> None:
        self.tensor = tensor
        self.kind = type(tensor)
        self.attributes = dict(vars(tensor))
        self.requires_grad = tensor.requires_grad
        self.impl = tensor._cdata  # noqa: SLF001  (which of torch's own tensors the object stands for)
        self.is_lazy = torch.nn.parameter.is_lazy(tensor)
        self.grad = None if self.is_lazy or not tensor.is_leaf else tensor.grad
        # Shares memory with the tensor, and keeps it if the tensor gets other memory.
        self.alias = tensor.data if self.is_lazy else tensor.detach()
        self.elements = None
        keeps = values and not (self.is_lazy or tensor.is_meta)
        self.elements = self._elements(needed=needed) if keeps else None

    def _elements(self, *, needed: bool) -> torch.Tensor | None:
        try:
            return self.alias.clone()
        except Exception as error:
            if not needed:
                return None
            what = f"a {self.kind.__name__} cannot be copied, so a failed load could not be undone: {error}"
            raise UnsupportedError(what, hint='load with mode="swap"') from error

    def restore(self) -> None:
        if self.is_lazy:
            self.tensor.data = self.alias
            self.tensor.__class__ = self.kind
        elif self.tensor._cdata != self.impl:  # noqa: SLF001
            spare = torch.nn.Parameter(self.alias, self.requires_grad) if self._is_parameter() else self.alias
            torch.utils.swap_tensors(self.tensor, spare)  # type: ignore[no-untyped-call]
        elif self._is_elsewhere():
            self.tensor.data = self.alias
        if self.elements is not None:
            self.alias.copy_(self.elements)
        vars(self.tensor).clear()
        vars(self.tensor).update(self.attributes)
        if not self.is_lazy and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)
        if self.tensor.is_leaf and not self.is_lazy and self.tensor.grad is not self.grad:
            self.tensor.grad = self.grad

    def _is_parameter(self) -> bool:
        return issubclass(self.kind, torch.nn.Parameter) or bool(self.attributes.get("_is_param"))

    def _is_elsewhere(self) -> bool:
        """Whether the tensor was given other memory, by an assignment to its `data`."""
        if self.tensor.shape != self.alias.shape or self.tensor.stride() != self.alias.stride():
            return True
        try:
            return self.tensor.data_ptr() != self.alias.data_ptr()
        except RuntimeError:
            # A wrapper subclass has no memory of its own.
            return False
