"""Compile a module so that every weight stays a slot of its own."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import warnings
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from reweft import _core
from reweft.errors import MismatchError, UnsupportedError, UsageError
from reweft.torch.compiled import CompiledModule, load
from reweft.torch.facts import attribute_changes
from reweft.torch.folding import Refused
from reweft.torch.freezing import Frozen
from reweft.torch.functions import Function, as_module
from reweft.torch.signature import describe, flatten
from reweft.torch.sources import LITERAL
from reweft.torch.tensors import dtype_name, held_tensors, identity, raw

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram

__all__ = ["Origins", "compiled_package", "compiler_settings", "exported", "origins", "trace"]

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
# Otherwise loops are compiled for the number of threads of this process: partial sums have room for that many, and more
# threads, on another host or after `torch.set_num_threads`, write past it.
_ANY_THREADS: dict[str, Any] = {"cpp.dynamic_threads": True}
_WEIGHTS_BESIDE_LIBRARY: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "binary_blob",
}


def trace(
    func_or_module: Callable[..., Any],
    example_inputs: torch.Tensor | tuple[Any, ...],
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    inline_weights: bool = True,
    compiler_workdir: str | os.PathLike[str] | None = None,
    compiler_args: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    strict: bool = False,
    freeze: bool | Literal["auto"] = False,
) -> CompiledModule:
    """Compile a module or a function through `torch.export` and AOTInductor so that every weight can be replaced.

    Takes seconds to minutes, in which a C++ compiler runs. The result takes inputs of the examples' structure, shapes,
    dtypes and devices only, but for the sizes that `dynamic_shapes` lets vary; anything else is refused when it is
    called, since the program itself would not notice. Arguments that are no tensors are compiled in, and a call with
    another value is refused too.

    Parameters, buffers and tensor attributes are slots under their path. A function's slots have the names that it has
    for its modules and tensors: `net.weight` for a module `net` that it refers to. What could not be kept as a slot is
    listed by `CompiledModule.refittable`.

    Args:
        func_or_module: A module in `eval()` mode, one of its methods, or a function of tensors; its weights are the
            first weights of the result.
        example_inputs: One tensor, or the tuple of positional arguments; containers of tensors are taken.
        kwargs: Keyword arguments.
        dynamic_shapes: Which sizes may vary, as for `torch.export.export`.
        inline_weights: Whether `save` writes the weights too. Without them the package is as small as the program, and
            `load(path, weights=...)` fills it.
        compiler_workdir: A folder in which the generated sources, the exported program and the options stay.
        compiler_args: `-O0` to `-O3`, for the C++ compiler.
        options: Settings of `torch._inductor.config`, but for those that decide whether a weight can be replaced; and
            two of our own, which the package keeps. With `immutable_weights=True` it refuses every refit, live and on
            disk; with `identical_weights=True` every one that brings other bytes than it has. Buffers that the program
            writes to may get others then. Weights that were left out of a package may be put back in either case.
            With `compare_code=False`, `freeze` leaves out generating the code a second time.
        device: Where the model runs. The module must be there already; None means wherever it is.
        strict: Refuse a module with a weight that could not be kept as a slot.
        freeze: Compile with the compiler's `freezing`, which folds weights into each other and packs them for the
            processor: the program is as fast as a frozen one. How each row comes from the weights is recorded, held
            against the package's own bytes, and stored with it, so that a refit gives what a new frozen compilation
            with the new weights would, byte for byte. What cannot be made again exactly is refused by name; with
            "auto" the module is then compiled without freezing, with a warning. Takes longer, since the code is
            generated twice, and holds what freezing computes in memory meanwhile.

    Raises:
        UsageError: The module is in training mode or on another device, an option would put weights into the code, or
            options contradict each other.
        MismatchError: `strict`, and a weight could not be kept as a slot.
        UnsupportedError: An argument is of a kind that a program cannot be held to, the program needs operators that
            the runtime cannot call, or torch cannot say what it writes to.
        Refused: An UnsupportedError, with `freeze=True`: a weight's value went into the code, or a row was made in a
            way that cannot be followed exactly.

    Example:
        >>> model = trace(net.eval(), (torch.zeros(1, 3, 8, 8),))  # doctest: +SKIP
        >>> replace_weights(model, "epoch3.pt")  # doctest: +SKIP
    """
    module = as_module(func_or_module)
    _check_mode(module)
    if freeze not in {True, False, "auto"}:
        raise UsageError(f'freeze is {freeze!r}, wanted True, False or "auto"')
    options = dict(options or {})
    refit, compare = _refit_rule(options), _flag(options, "compare_code", default=True)
    settings = compiler_settings(options, compiler_args)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    _check_device(module, device)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="reweft-") as folder:
        program = exported(module, args, kwargs or {}, dynamic_shapes)
        leaves = flatten(program.call_spec.in_spec, args, kwargs or {})
        stated = origins(program, leaves, module, refit)
        names = {origin.names[0]: origin.persistent for origin in stated.tensors}
        frozen = Frozen(program, names, compare=compare) if freeze else None
        try:
            sealed = compiled_package(
                program, stated, settings, Path(folder), compiler_workdir=compiler_workdir, frozen=frozen
            )
        except Refused as refused:
            if freeze != "auto":
                raise
            warnings.warn(f"compiled without freezing: {refused}", stacklevel=2)
            sealed = compiled_package(program, stated, settings, Path(folder), compiler_workdir=compiler_workdir)
        # The loader maps the package, which keeps the bytes when the folder goes.
        model = load(sealed)
    nameless = [names[0] for names in model.slots() if names[0].startswith(LITERAL)]
    _report(model, nameless if isinstance(module, Function) else [], strict=strict)
    model.inline_weights = inline_weights
    model._traced = weakref.ref(module)  # noqa: SLF001  (one package)
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    model._examples = [value.detach().clone() for value in inputs]  # noqa: SLF001
    return model


def exported(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Export a module, with every tensor of it under its path.

    Raises:
        UnsupportedError: An argument or result has a container that a package cannot name, or `forward` writes to
            attributes: export would compile the first call's values in and put the old ones back, without a word.
    """
    with attribute_changes(module) as changes:
        program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
    if changes:
        raise UnsupportedError(
            f"a call changes what the module is, which a program cannot do: {changes[0]}",
            hint="keep it in a buffer; if a call only remembers something, call the module once before",
        )
    _check_structure(program)
    _name_constants(program, module)
    return program


def compiled_package(
    program: ExportedProgram,
    stated: Origins,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    compiler_workdir: str | os.PathLike[str] | None = None,
    frozen: Frozen | None = None,
) -> Path:
    """Compile an exported program, which is changed by it; gives a package with manifest and weights in a folder.

    What was generated stays in `compiler_workdir`, if there is one. With `frozen`, the compiler freezes.

    Raises:
        UnsupportedError: The compiler assumes what the manifest cannot state.
        Refused: A frozen program could not be refitted exactly.
    """
    _drop_constant_results(program)
    fresh, sealed = folder / "model.pt2", folder / "sealed.pt2"
    if any(origin.used for origin in stated.tensors):
        # Without any weight torch makes a package with an empty record, which it cannot load itself.
        settings = {**settings, **_WEIGHTS_BESIDE_LIBRARY}
    if frozen is None:
        _compile(program, fresh, settings)
        _core.seal(fresh, stated.to_json(), sealed)
    else:
        settings = {**settings, "freezing": True}
        folded = frozen.compile(lambda settings: _compile(program, fresh, settings), settings)
        frozen.seal(fresh, stated.to_json(folded), sealed)
    if compiler_workdir is not None:
        _keep_sources(Path(compiler_workdir), fresh, program, settings)
    return sealed


def _check_mode(module: torch.nn.Module) -> None:
    """Refuse what would compute as in training.

    Raises:
        UsageError: A module is in training mode.
    """
    parts = module.children() if isinstance(module, Function) else [module]
    for part in parts:
        if part.training:
            raise UsageError("the module is in training mode", hint="call module.eval() before trace")


def _check_structure(program: ExportedProgram) -> None:
    """Refuse containers that a package cannot name.

    Raises:
        UnsupportedError: An argument or result has one.
    """
    for what, spec in [("arguments", program.call_spec.in_spec), ("results", program.call_spec.out_spec)]:
        try:
            pytree.treespec_dumps(spec)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"the {what} have a container that a package cannot name: {error}",
                hint="pass tuples, lists and dicts, or register the class with a serialized_type_name",
            ) from error


def _check_device(module: torch.nn.Module, device: str | torch.device | None) -> None:
    """Refuse a module that is somewhere else: moving it would change the caller's module.

    Raises:
        UsageError: It is on another device, or on several.
    """
    tensors = [*module.parameters(), *module.buffers()]
    found = sorted({str(value.device.type) for value in tensors})
    if len(found) > 1:
        raise UsageError(f"the module's weights are on {' and '.join(found)}", hint="move the module to one device")
    wanted = found[0] if device is None and found else str(torch.device(device or "cpu").type)
    if found and found[0] != wanted:
        raise UsageError(f"the module is on {found[0]}, device={wanted!r} was asked for", hint=f"module.to({wanted!r})")


def _flag(options: dict[str, Any], name: str, *, default: bool) -> bool:
    """A setting of our own; takes it out.

    Raises:
        UsageError: It is no bool.
    """
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}, wanted True or False")
    return value


def _refit_rule(options: dict[str, Any]) -> str:
    """Which new weights the package is to take, from options that are not the compiler's; takes them out.

    Raises:
        UsageError: One is no bool, or both are set.
    """
    rules = {"immutable_weights": "never", "identical_weights": "identical"}
    asked = {name: options.pop(name) for name in rules if name in options}
    for name, value in asked.items():
        if not isinstance(value, bool):
            raise UsageError(f"{name} is {value!r}, wanted True or False")
    found = [rule for name, rule in rules.items() if asked.get(name)]
    if len(found) > 1:
        raise UsageError(
            "immutable_weights and identical_weights are both set",
            hint="immutable weights take no refit at all; set one of them",
        )
    return found[0] if found else "any"


def compiler_settings(options: Mapping[str, Any], compiler_args: str | Sequence[str] | None) -> dict[str, Any]:
    """The compiler's settings.

    Raises:
        UsageError: An option would put weights into the code.
        UnsupportedError: There is no such argument.
    """
    settings = dict(options)
    for name, value in {**_KEEP_CONSTANTS, **_WEIGHTS_BESIDE_LIBRARY, **_ANY_THREADS}.items():
        if settings.get(name, value) != value:
            if name == "freezing":
                raise UsageError("freezing=True alone would fold weights for good", hint="trace(..., freeze=True)")
            why = "fix the number of threads" if name in _ANY_THREADS else "take weights away from their slots"
            raise UsageError(f"{name}={settings[name]!r} would {why}; trace needs {value!r}")
    arguments = compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or ())
    for argument in arguments:
        if argument not in {"-O0", "-O1", "-O2", "-O3"}:
            raise UnsupportedError(
                f"compiler_args has {argument!r}; -O0 to -O3 are taken", hint="options= takes torch._inductor.config"
            )
        settings["aot_inductor.compile_wrapper_opt_level"] = argument.removeprefix("-")
    return {**settings, **_KEEP_CONSTANTS, **_ANY_THREADS}


def _compile(program: ExportedProgram, package: Path, settings: Mapping[str, Any]) -> None:
    """Run the compiler.

    Raises:
        UnsupportedError: It assumes more of a size than export states.
    """
    with _without_ignored_guards():
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001  (torch documents it under this name)
            program, package_path=str(package), inductor_configs=dict(settings)
        )


def _keep_sources(folder: Path, package: Path, program: ExportedProgram, settings: Mapping[str, Any]) -> None:
    """Unpack what was generated, and write down what it was generated from."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package) as archive:
        for record in archive.infolist():
            name = PurePosixPath(record.filename).name
            if name.endswith((".cpp", ".json", ".h")):
                (folder / name).write_bytes(archive.read(record))
    (folder / "program.txt").write_text(str(program))
    (folder / "options.json").write_text(json.dumps(settings, indent=2, default=str))


@contextlib.contextmanager
def _without_ignored_guards() -> Iterator[None]:
    """Refuse a compilation that assumes something of a size that export did not state.

    torch only writes a warning to its log then: "Ignored guard".

    Raises:
        UnsupportedError: It did.
    """
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if ignored := next((text for text in seen if "gnored guard" in text), None):
        raise UnsupportedError(f"the compiler assumed more of a dynamic size than export states: {ignored}")


def _report(model: CompiledModule, nameless: list[str], *, strict: bool) -> None:
    """Say which weights could not be kept as slots, or have no name that a checkpoint could have.

    Raises:
        MismatchError: `strict`, and there are some.
    """
    absent = dict(model.refittable().unrefittable)
    why = "the function computes with it, and refers to it by no name of its own; a refit keeps it"
    absent.update(dict.fromkeys(nameless, why))
    if not absent:
        return
    what = "; ".join(f"{name!r}: {reason}" for name, reason in absent.items())
    if strict:
        raise MismatchError(f"these weights could not be kept as slots: {what}", key=next(iter(absent)))
    warnings.warn(f"these weights cannot be replaced by name: {what}", stacklevel=3)


@dataclass(frozen=True)
class _Origin:
    """One tensor of the module."""

    names: list[str]
    persistent: bool
    mutated: bool
    used: bool


@dataclass(frozen=True)
class Origins:
    """What the package does not say of itself; `reweft::artifact::manifest::Origins` on the other side."""

    signature: dict[str, Any]
    device: str
    refit: str
    tensors: list[_Origin]
    program: str | None = None

    def to_json(self, folded: Mapping[str, Any] | None = None) -> str:
        """What the engine reads."""
        tensors = [vars(origin) for origin in self.tensors]
        stated: dict[str, Any] = {
            "torch": str(torch.__version__),
            "device": self.device,
            "refit": self.refit,
            "program": self.program,
        }
        if folded is not None:
            stated["folded"] = {key: folded[key] for key in ("capability", "compared", "recipes")}
            stated["folded"]["originals"] = [
                original
                for kind in ("originals", "fixed")
                for name, value in folded[kind].items()
                # A tensor that is a row, under whichever of its names, need not be named twice.
                if (original := self._original(name, value, folded["rows"], fixed=kind == "fixed"))
            ]
        return json.dumps({**stated, **self.signature, "tensors": tensors})

    def _original(self, name: str, value: torch.Tensor, rows: set[str], *, fixed: bool) -> dict[str, Any] | None:
        """A tensor that went into rows, with all its names, and with a hash if its value must stay."""
        origin = next(origin for origin in self.tensors if origin.names[0] == name)
        if not rows.isdisjoint(origin.names) or (fixed and not origin.used):
            return None
        return {
            "names": origin.names,
            "persistent": origin.persistent,
            "dtype": dtype_name(value.dtype),
            "shape": list(value.shape),
            "fixed": _core.row_hash(raw(value)) if fixed else None,
        }


def _name_constants(program: ExportedProgram, module: torch.nn.Module) -> None:
    """Make tensor attributes buffers that no state_dict has.

    The compiler numbers lifted constants (`_tensor_constant0`) and forgets where they came from; buffers keep their
    names. The values stay in `program.constants`, where non-persistent buffers are too. Tensors in lists and dicts of
    the module come from export as `lifted_tensor_N`, like literals of `forward`; they are told apart by identity and
    get their path as name.
    """
    paths = {identity(path, value): path for path, value in held_tensors(module)}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.CONSTANT_TENSOR or spec.target is None:
            continue
        spec.kind = InputKind.BUFFER
        spec.persistent = False
        value = program.constants[spec.target]
        path = paths.get(identity(spec.target, value))
        if path is not None and path not in program.constants and path not in program.state_dict:
            program.constants[path] = program.constants.pop(spec.target)
            spec.target = path


def _drop_constant_results(program: ExportedProgram) -> None:
    """Take numbers and texts out of the results: the manifest has them, and the compiler fails on some."""
    results = program.graph.output_node()
    kept = tuple(value if isinstance(value, torch.fx.Node) else None for value in results.args[0])
    results.args = (kept,)
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT and isinstance(spec.arg, ConstantArgument):
            spec.arg = ConstantArgument(name=spec.arg.name, value=None)
    program.graph_module.recompile()


def origins(program: ExportedProgram, leaves: list[object], module: torch.nn.Module, refit: str) -> Origins:
    """Every tensor of the module with all its names, and how the program is called.

    Raises:
        UnsupportedError: An argument or an attribute of the module is of a kind that no program takes.
    """
    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: dict[str, torch.Tensor] = {**program.state_dict, **program.constants}
    mutated, written_inputs = _mutated(program)
    used: set[str] = set()
    persistent: set[str] = set(program.state_dict)
    if isinstance(module, Function):
        # A function has no other state than what it refers to, so a checkpoint of it must have all of that.
        persistent |= {name for name in values if not name.startswith(LITERAL)}
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind != InputKind.USER_INPUT and spec.target is not None and placeholders[name].users:
            used.add(spec.target)
    called = describe(program, leaves, written_inputs)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for fqn, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(f"{fqn!r} is a {type(value).__name__}; this version takes tensors only")
        groups.setdefault(identity(fqn, value), []).append(fqn)
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
    devices = {str(value.device.type) for value in values.values()} or {row["device"] for row in called["inputs"]}
    if len(devices) > 1:
        raise UnsupportedError(f"the module's tensors are on {' and '.join(sorted(devices))}")
    device = devices.pop() if devices else "cpu"
    return Origins(signature=called, device=device, refit=refit, tensors=tensors)


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
