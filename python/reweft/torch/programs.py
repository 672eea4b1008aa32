"""Compiled programs without weights, kept by what they were compiled from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
import torch._inductor.config
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from reweft import _core
from reweft.errors import UnsupportedError, UsageError
from reweft.torch.signature import describe, size_of
from reweft.torch.tensors import dtype_name, identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.export import ExportedProgram

__all__ = ["NoKeyError", "ProgramCache", "key_of", "number_weights"]

# Part of every key: another way to describe a program, or to compile it, makes other keys.
_VERSION = 1
_DEFAULT_MAX_NBYTES = 4 << 30
# Higher-order operators whose arguments say all about them. Others, as Triton's kernels, refer to tables elsewhere.
_PLAIN_OPERATORS = {"cond", "while_loop", "map_impl", "scan", "associative_scan", "wrap_with_set_grad_enabled"}
# Python functions between sizes, by the module that has them.
_PLAIN_MODULES = {"_operator", "math", "builtins", "torch"}
# Passes of the user's over the compiler's graphs; nothing says what they do.
_PASSES = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "custom_partitioner_fn",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
)
# What a compilation leaves among the settings.
_RESULTS = {"aot_inductor.metadata"}


class NoKeyError(Exception):
    """A program depends on something that cannot be written down, so that it cannot be told from others."""


class ProgramCache:
    """A folder of compiled programs, which hold no weights; processes may share it.

    A program is found by a key: a hash of the graph with all call arguments, the inputs, the options, torch and the
    processor, and of nothing that names or holds a weight. Files are written whole or not at all, and hold no pickle.
    When all together are larger than `max_nbytes`, those that were used longest ago are removed.

    Whoever can write to the folder decides what code runs: it is made for its owner alone, and one that others own or
    can write to is not used. A class derived from this one may keep programs elsewhere: `compile` calls `get`, `put`,
    `drop` and `compiling`.

    Args:
        folder: None means `programs` in the folder that `REWEFT_CACHE_DIR` names, or in `reweft` in the user's folder
            for caches.
        max_nbytes: Bytes of all programs together.

    Raises:
        UsageError: `folder` is None, and there is no home folder.

    Example:
        >>> ProgramCache("/tmp/none-yet").list()
        []
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_nbytes: int = _DEFAULT_MAX_NBYTES) -> None:
        self.folder = _user_folder() if folder is None else Path(folder)
        self.max_nbytes = max_nbytes

    def get(self, key: str) -> Path | None:
        """The package of a program, if it is there; it counts as used now."""
        path = self._path(key)
        if not path.exists() or not self._is_private():
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    def put(self, key: str, package: Path) -> Path | None:
        """Keep a copy of a package; gives its place, or None where it could not be kept.

        Warns:
            UserWarning: The folder cannot be used, or the disk is full; the message says why.
        """
        path = self._path(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_private() or package.stat().st_size > self.max_nbytes:
                return None
            partial = path.with_name(f".reweft-{key}-{os.getpid()}")
            try:
                partial.write_bytes(package.read_bytes())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._trim(path)
        except OSError as error:
            warnings.warn(f"{self.folder}: the program is not kept: {error}", stacklevel=2)
            return None
        return path

    def drop(self, key: str) -> None:
        """Remove a program."""
        self._path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def compiling(self, key: str) -> Iterator[None]:
        """Held by whoever compiles a program, so that others wait for it and find it."""
        lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_private():
                lock = filelock.FileLock(self.folder / f"{key}.lock")
        with lock:
            yield

    def list(self) -> list[Path]:
        """All programs, those that were used longest ago first."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime_ns)

    def clear(self) -> None:
        """Remove all programs. Models that run have theirs in memory."""
        for path in self.list():
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt2"

    def _trim(self, newest: Path) -> None:
        """Remove what was used longest ago until the rest fits."""
        sizes = {path: path.stat().st_size for path in self.list()}
        total = sum(sizes.values())
        for path, nbytes in sizes.items():
            if total <= self.max_nbytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= nbytes

    def _is_private(self) -> bool:
        """Whether nobody but this user can put a program here."""
        try:
            _core.check_private(self.folder)
        except UnsupportedError as error:
            warnings.warn(f"compiled programs are not kept: {error}", stacklevel=3)
            return False
        return True


def _user_folder() -> Path:
    """The folder of programs, beside that of libraries.

    Raises:
        UsageError: There is no home folder.
    """
    folder = _core.cache_folder()
    if folder is None:
        raise UsageError("there is no home folder to keep programs in", hint="REWEFT_CACHE_DIR names a folder")
    return folder / "programs"


def number_weights(program: ExportedProgram) -> list[str]:
    """Give the tensors of an exported program numbers for names: `w0`, `w1`, in the order in which it uses them.

    Returns:
        The names that they had.
    """
    specs = {
        getattr(spec.arg, "name", ""): spec
        for spec in program.graph_signature.input_specs
        if spec.kind != InputKind.USER_INPUT and spec.target is not None
    }
    used = (node.name for user in program.graph.nodes for node in user.all_input_nodes)
    # Those that it does not use come last, in the order of its inputs.
    order = list(dict.fromkeys(name for name in (*used, *specs) if name in specs))
    paths = [str(specs[name].target) for name in order]
    for number, name in enumerate(order):
        specs[name].target = f"w{number}"
    for tensors in (program.state_dict, program.constants):
        numbered = {f"w{number}": tensors[path] for number, path in enumerate(paths) if path in tensors}
        tensors.clear()
        tensors.update(numbered)
    return paths


def key_of(program: ExportedProgram, leaves: list[object], settings: Mapping[str, Any]) -> str:
    """What tells a program from others: a hash of all that its code depends on, and of no weight and no name of one.

    Costs a walk through the graph.

    Args:
        program: An exported program whose weights have numbers for names.
        leaves: The example arguments, flattened.
        settings: The compiler's settings.

    Raises:
        NoKeyError: It depends on something that cannot be written down.
        UnsupportedError: An argument is of a kind that no program can be held to.
    """
    writer = _Writer()
    stated = describe(program, leaves, set())
    content = {
        "inputs": [
            {key: writer.size(row[key]) for key in ("dtype", "shape", "strides", "device")} for row in stated["inputs"]
        ],
        "leaves": stated["leaves"],
        "outputs": stated["outputs"],
        "symbols": {writer.size(name): bounds for name, bounds in stated["symbols"].items()},
        "guards": writer.size(stated["guards"]),
        "structure": [pytree.treespec_dumps(spec) for spec in (program.call_spec.in_spec, program.call_spec.out_spec)],
        "weights": _weights(program),
        "graph": writer.graph(program.graph_module, _placeholders(program)),
        "environment": _environment(settings),
    }
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _placeholders(program: ExportedProgram) -> dict[str, str]:
    """Which weight each node of the graph stands for that is one."""
    specs = program.graph_signature.input_specs
    return {getattr(spec.arg, "name", ""): spec.target for spec in specs if spec.target is not None}


def _weights(program: ExportedProgram) -> list[Any]:
    """How the weights lie, and which of them share memory."""
    values: dict[str, Any] = {**program.state_dict, **program.constants}
    storages: dict[int, int] = {}
    tied: dict[tuple[Any, ...], int] = {}
    rows: list[Any] = []
    for number in range(len(_placeholders(program))):
        value = values.get(f"w{number}")
        if not isinstance(value, torch.Tensor):
            rows.append(type(value).__name__)
            continue
        storage = value.untyped_storage()
        # What has no elements has no address of its own.
        owner = storages.setdefault(storage.data_ptr(), len(storages)) if value.numel() else -1
        place = [owner, value.storage_offset(), storage.nbytes()]
        group = tied.setdefault(identity(f"w{number}", value), len(tied))
        rows.append([group, place, dtype_name(value.dtype), list(value.shape), list(value.stride()), str(value.device)])
    return rows


def _environment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What compilation depends on beside the program.

    Raises:
        NoKeyError: A pass of the user's is among it.
    """
    config = torch._inductor.config  # noqa: SLF001  (torch documents it under this name)
    for name in _PASSES:
        if settings.get(name) is not None or getattr(config, name, None) is not None:
            raise NoKeyError(f"the compiler runs a pass of the user's, {name}")
    return {
        "version": [_VERSION, str(torch.__version__), torch.version.git_version],
        "host": [json.loads(_core.host()), torch.backends.cpu.get_cpu_capability()],
        "compiler": [os.environ.get("CXX"), os.environ.get("CC")],
        "settings": dict(settings),
        "inductor": {name: value for name, value in config.save_config_portable().items() if name not in _RESULTS},
        "flags": [
            str(torch.get_default_dtype()),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,  # type: ignore[no-untyped-call]
        ],
    }


class _Writer:
    """Writes a graph as plain data, with numbers for the names of nodes and sizes."""

    def __init__(self) -> None:
        self._symbols: dict[str, str] = {}

    def size(self, stated: Any) -> Any:
        """What the manifest would state, with other names for sizes that vary: torch's depend on those of arguments."""
        if isinstance(stated, dict):
            return {"op": stated["op"], "of": self.size(stated["of"])}
        if isinstance(stated, list):
            return [self.size(part) for part in stated]
        if isinstance(stated, str) and stated[:1] in {"s", "u"} and stated[1:].isdigit():
            return self._symbols.setdefault(stated, f"size{len(self._symbols)}")
        return stated

    def graph(self, module: torch.fx.GraphModule, weights: Mapping[str, str]) -> list[Any]:
        """The nodes in their order, without those that stand for weights.

        Raises:
            NoKeyError: One cannot be written down.
        """
        numbers: dict[torch.fx.Node, int | str] = {}
        rows: list[Any] = []
        for node in module.graph.nodes:
            if node.op == "placeholder" and node.name in weights:
                numbers[node] = weights[node.name]
                continue
            numbers[node] = len(rows)
            if node.op == "placeholder":
                rows.append(["placeholder", self._meta(node.meta.get("val"))])
            elif node.op == "call_function":
                rows.append([_target(node.target), self._value(node.args, numbers), self._value(node.kwargs, numbers)])
            elif node.op == "output":
                rows.append(["output", self._value(node.args, numbers)])
            elif node.op == "get_attr" and isinstance(part := getattr(module, node.target, None), torch.fx.GraphModule):
                rows.append(["graph", self.graph(part, {})])
            else:
                raise NoKeyError(f"the graph has a node {node.op} of {node.target}")
        return rows

    def _meta(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sizes = [self._size(size) for size in (*value.shape, *value.stride())]
            return [dtype_name(value.dtype), sizes, str(value.device)]
        if isinstance(value, list | tuple):
            return [self._meta(part) for part in value]
        return self._value(value, {})

    def _size(self, value: Any) -> Any:
        try:
            return self.size(size_of(value))
        except UnsupportedError as error:
            raise NoKeyError(str(error)) from error

    def _value(self, value: Any, numbers: Mapping[torch.fx.Node, int | str]) -> Any:
        """An argument; every kind is written in a way of its own.

        Raises:
            NoKeyError: It is of another kind.
        """
        written: Any
        if isinstance(value, torch.fx.Node):
            written = {"node": numbers[value]}
        elif isinstance(value, list | tuple):
            written = [self._value(part, numbers) for part in value]
        elif isinstance(value, dict):
            written = {"dict": [[str(key), self._value(part, numbers)] for key, part in sorted(value.items())]}
        elif isinstance(value, slice):
            written = {"slice": self._value([value.start, value.stop, value.step], numbers)}
        elif isinstance(value, torch.SymInt):
            written = {"size": self._size(value)}
        elif isinstance(value, bool | int | str | None):
            written = value
        elif isinstance(value, float | complex):
            written = {type(value).__name__: [value.real.hex(), value.imag.hex()]}
        elif isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format) or value is Ellipsis:
            written = {type(value).__name__: str(value)}
        else:
            raise NoKeyError(f"an argument in the graph is a {type(value).__name__}")
        return written


def _target(target: Any) -> str:
    """An operator, with its schema: two of one name may be registered in two processes.

    Raises:
        NoKeyError: It is none of those that are known by their name.
    """
    if isinstance(target, torch._ops.OpOverload):  # noqa: SLF001  (torch exports no other name)
        return str(target._schema)  # noqa: SLF001
    name = getattr(target, "__name__", type(target).__name__)
    if isinstance(target, torch._ops.HigherOrderOperator):  # noqa: SLF001
        if name in _PLAIN_OPERATORS:
            return f"higher order {name}"
    elif getattr(target, "__module__", None) in _PLAIN_MODULES:
        return f"{target.__module__}.{name}"
    raise NoKeyError(f"the graph calls {name}")


def _text(content: Any) -> str:
    """JSON that is the same for the same content, whatever the order of dicts and sets.

    Raises:
        NoKeyError: There is something that it cannot state.
    """

    def other(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value, key=repr)
        raise NoKeyError(f"a setting is a {type(value).__name__}, which cannot be written down")

    return json.dumps(content, sort_keys=True, default=other)
