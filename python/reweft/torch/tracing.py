"""Compile a module so that every weight stays a slot of its own."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from reweft import _core
from reweft.errors import UnsupportedError, UsageError
from reweft.torch.compiled import CompiledModule, load
from reweft.torch.tensors import dtype_name, held_tensors

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["trace"]

# What each option is for; without them AOTInductor writes small tensors and folded scalars into the code.
_KEEP_CONSTANTS: dict[str, Any] = {
    # 0-dim tensors and 1-D ones of up to 8 elements stay constants.
    "always_keep_tensor_constants": True,
    # Chains of one-element weights are computed at run time.
    "joint_graph_constant_folding": False,
    # Both replace weights by values made of them, whatever the user's global configuration says.
    "freezing": False,
    "aot_inductor.use_runtime_constant_folding": False,
}
_WEIGHTS_BESIDE_LIBRARY: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
}


def trace(module: torch.nn.Module, example_inputs: torch.Tensor | tuple[torch.Tensor, ...]) -> CompiledModule:
    """Compile a module through `torch.export` and AOTInductor so that every parameter and buffer can be replaced.

    Takes seconds to minutes, in which a C++ compiler runs. The result takes inputs of the examples' shapes, dtypes
    and devices only. Tensor attributes that are neither parameters nor buffers become slots under their attribute
    path. What could not be kept as a slot is listed by `CompiledModule.unrefittable`.

    Args:
        module: In `eval()` mode; its weights are the first weights of the result.
        example_inputs: One tensor, or the tuple of positional arguments.

    Raises:
        UsageError: The module is in training mode.
        UnsupportedError: An argument is no tensor, the program needs operators that the runtime cannot call, or torch
            cannot say what it writes to.

    Example:
        >>> model = trace(net.eval(), (torch.zeros(1, 3, 8, 8),))  # doctest: +SKIP
        >>> replace_weights(model, "epoch3.pt")  # doctest: +SKIP
    """
    if module.training:
        raise UsageError("the module is in training mode", hint="call module.eval() before trace")
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    for number, value in enumerate(inputs):
        if not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise UnsupportedError(f"example input {number} is a {kind}; this version takes tensors only")
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="reweft-") as folder:
        program = torch.export.export(module, inputs)
        _name_constants(program, module)
        origins = _origins(program, inputs)
        fresh, sealed = Path(folder) / "model.pt2", Path(folder) / "sealed.pt2"
        options = dict(_KEEP_CONSTANTS)
        if any(origin.used for origin in origins.tensors):
            # Without any weight torch makes a package with an empty record, which it cannot load itself.
            options.update(_WEIGHTS_BESIDE_LIBRARY)
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001  (torch documents it under this name)
            program, package_path=str(fresh), inductor_configs=options
        )
        _core.seal(fresh, origins.to_json(), sealed)
        # The loader maps the package, which keeps the bytes when the folder goes.
        return load(sealed)


@dataclass(frozen=True)
class _Origin:
    """One tensor of the module."""

    names: list[str]
    persistent: bool
    mutated: bool
    used: bool


@dataclass(frozen=True)
class _Origins:
    """What the package does not say of itself; `reweft::artifact::manifest::Origins` on the other side."""

    inputs: list[dict[str, Any]]
    device: str
    tensors: list[_Origin]

    def to_json(self) -> str:
        tensors = [vars(origin) for origin in self.tensors]
        version = str(torch.__version__)
        return json.dumps({"torch": version, "device": self.device, "inputs": self.inputs, "tensors": tensors})


def _name_constants(program: ExportedProgram, module: torch.nn.Module) -> None:
    """Make tensor attributes buffers that no state_dict has.

    The compiler numbers lifted constants (`_tensor_constant0`) and forgets where they came from; buffers keep their
    names. The values stay in `program.constants`, where non-persistent buffers are too. Tensors in lists and dicts of
    the module come from export as `lifted_tensor_N`, like literals of `forward`; they are told apart by identity and
    get their path as name.
    """
    paths = {_identity(path, value): path for path, value in held_tensors(module)}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.CONSTANT_TENSOR or spec.target is None:
            continue
        spec.kind = InputKind.BUFFER
        spec.persistent = False
        value = program.constants[spec.target]
        path = paths.get(_identity(spec.target, value))
        if path is not None and path not in program.constants and path not in program.state_dict:
            program.constants[path] = program.constants.pop(spec.target)
            spec.target = path


def _origins(program: ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> _Origins:
    """Every tensor of the module with all its names, and the inputs in call order.

    Raises:
        UnsupportedError: An input or an attribute of the module is no tensor.
    """
    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
    mutated, written_inputs = _mutated(program)
    used: set[str] = set()
    persistent: set[str] = set(program.state_dict)
    user_inputs: list[str] = []
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument) or not isinstance(spec.arg, TensorArgument):
                raise UnsupportedError(f"input {name!r} is no tensor; this version takes tensors only")
            user_inputs.append(name)
        elif spec.target is not None and placeholders[name].users:
            used.add(spec.target)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for fqn, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(f"{fqn!r} is a {type(value).__name__}; this version takes tensors only")
        groups.setdefault(_identity(fqn, value), []).append(fqn)
    tensors = [
        _Origin(
            names=names,
            persistent=any(name in persistent for name in names),
            mutated=any(name in mutated for name in names),
            # The compiler keeps one row for all empty tensors; there is nothing in them to replace.
            used=values[names[0]].numel() > 0 and any(name in used or name in mutated for name in names),
        )
        for names in groups.values()
    ]
    rows = [
        {**_input_row(value), "name": name, "mutated": name in written_inputs}
        for name, value in zip(user_inputs, inputs, strict=True)
    ]
    devices = {str(value.device.type) for value in values.values()} or {row["device"] for row in rows}
    return _Origins(inputs=rows, device=devices.pop() if len(devices) == 1 else "cpu", tensors=tensors)


def _mutated(program: ExportedProgram) -> tuple[set[str], set[str]]:
    """Names of weights and of inputs that the program writes to.

    An exported program still has in-place operations; only its functional form, which the compiler works on, states
    what they write to. The runtime must know: it maps all other weights read-only.

    Raises:
        UnsupportedError: torch cannot make the functional form.
    """
    try:
        signature = program.run_decompositions({}).graph_signature
    except AssertionError as error:
        # torch asserts where a buffer that is written to is a view of another one.
        raise UnsupportedError(f"torch cannot make the program functional: {error}") from error
    parameters: dict[str, str] = getattr(signature, "parameters_to_mutate", {})
    return {*signature.buffers_to_mutate.values(), *parameters.values()}, {*signature.user_inputs_to_mutate.values()}


def _identity(fqn: str, value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for names of one tensor. Empty tensors have no address to be told apart by, so each is its own."""
    if value.numel() == 0:
        return (fqn,)
    where = (value.untyped_storage().data_ptr(), value.storage_offset())
    return (*where, tuple(value.shape), value.stride(), value.dtype)


def _input_row(value: torch.Tensor) -> dict[str, Any]:
    return {
        "dtype": dtype_name(value.dtype),
        "shape": list(value.shape),
        "strides": list(value.stride()),
        "device": str(value.device.type),
    }
