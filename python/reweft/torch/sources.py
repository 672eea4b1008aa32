"""What new weights may come from, as checkpoints: modules, exported programs, state_dicts, files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import torch
from torch.export import ExportedProgram

from reweft.checkpoint import Checkpoint
from reweft.checkpoint import open as open_checkpoint
from reweft.errors import MismatchError, UsageError
from reweft.torch.tensors import checkpoint_of, held_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LITERAL", "Source", "source_of"]

# Literals of `forward` are part of the program and not of the module; export numbers them.
LITERAL = "lifted_tensor_"


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what of it is not the caller's own memory."""

    checkpoint: Checkpoint
    resolved: dict[str, int] = field(default_factory=dict)
    """Lazily conjugated or negated tensors, which had to be computed, with their bytes."""


def source_of(slots: Iterable[tuple[str, ...]], weights: object, top_level_key: str | None) -> Source:
    """See weights as a checkpoint. Copies no bytes.

    Args:
        slots: The names of each slot; for modules and programs, which have tensors that no state_dict has.
        weights: A module, an exported program, a state_dict, a path or a checkpoint.
        top_level_key: Dotted path of the dict that holds the weights; for files.

    Raises:
        UsageError: They are none of these.
        MismatchError: A module or program has no tensor for a slot that no state_dict would have.
    """
    if isinstance(weights, str | os.PathLike):
        return Source(open_checkpoint(weights, top_level_key=top_level_key, mmap=True))
    if top_level_key is not None:
        raise UsageError("top_level_key is for checkpoint files")
    if isinstance(weights, Checkpoint):
        return Source(weights)
    if isinstance(weights, torch.nn.Module):
        return _in_memory(_module_tensors(slots, weights), type(weights).__name__)
    if isinstance(weights, ExportedProgram):
        return _in_memory(_program_tensors(slots, weights), "exported program")
    if isinstance(weights, Mapping):
        return _in_memory(weights, "state_dict")
    wanted = "a module, an exported program, a state_dict, a path, a Checkpoint or a CompiledModule"
    raise UsageError(f"weights are a {type(weights).__name__}, wanted {wanted}")


def _in_memory(tensors: Mapping[str, torch.Tensor], name: str) -> Source:
    checkpoint = checkpoint_of(tensors, name)
    resolved = {key: value.nbytes for key, value in tensors.items() if value.is_conj() or value.is_neg()}
    return Source(checkpoint, resolved)


def _module_tensors(slots: Iterable[tuple[str, ...]], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's state_dict, and what of the slots is not in one: other buffers and tensor attributes.

    Raises:
        MismatchError: The module has no tensor for a slot that no state_dict would have.
    """
    state = dict(module.state_dict(keep_vars=True))
    held = dict(held_tensors(module))
    held.update(module.named_buffers(remove_duplicate=False))
    for names in slots:
        for name in names:
            value = held[name] if name in held else _attribute(module, name)
            if name not in state and value is not None:
                state[name] = value
        if not names[0].startswith(LITERAL) and not any(name in state for name in names):
            _refuse(type(module).__name__, names[0], "the model was compiled from a module of another architecture")
    return state


def _program_tensors(slots: Iterable[tuple[str, ...]], program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The program's state_dict, and what of the slots is among its constants under the same name.

    Numbered constants are left out: their numbers are the program's own.

    Raises:
        MismatchError: The program has no tensor for a slot that no state_dict would have.
    """
    state: dict[str, torch.Tensor] = dict(program.state_dict)
    for names in slots:
        if names[0].startswith(LITERAL):
            continue
        for name in names:
            value = program.constants.get(name)
            if name not in state and isinstance(value, torch.Tensor):
                state[name] = value
        if not any(name in state for name in names):
            _refuse(
                "exported program", names[0], "a program numbers tensors in lists and dicts; give the module instead"
            )
    return state


def _refuse(who: str, name: str, hint: str) -> NoReturn:
    raise MismatchError(f"{who}: {name!r}: it has no such tensor", key=name, hint=hint)


def _attribute(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    owner, _, attribute = name.rpartition(".")
    try:
        value = getattr(module.get_submodule(owner), attribute, None)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None
