"""Compiled modules that follow the module they were made of, and refit a cached program instead of compiling again."""

from __future__ import annotations

import copy
import enum
import json
import logging
import re
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch.utils import _pytree as pytree

from reweft import _core
from reweft.errors import FormatError, MismatchError, ReweftError, UnsupportedError, UsageError
from reweft.torch.compiled import CompiledModule, load, report_of, save
from reweft.torch.facts import Facts, tensors_of, watched
from reweft.torch.files import save_file
from reweft.torch.folding import Refused
from reweft.torch.freezing import Frozen
from reweft.torch.kinds import same_bytes
from reweft.torch.loading import load_into
from reweft.torch.programs import NoKeyError, ProgramCache, key_of, number_weights
from reweft.torch.signature import flatten
from reweft.torch.tensors import checkpoint_of
from reweft.torch.tracing import compiled_package, compiler_settings, exported, origins

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch.export import ExportedProgram

__all__ = ["LiveModule", "WeightsState", "compile", "load_compiled"]

_log = logging.getLogger("reweft.torch")
# What a folder of `save_compiled` has.
_WEIGHTS, _OPTIONS, _PROGRAMS = "weights.safetensors", "options.json", "programs"


class WeightsState(enum.Enum):
    """How a compiled module stands to the module that it follows."""

    LIVE = "live"
    """The next call runs as it is. Values that were changed in place are seen."""
    NEEDS_REFIT = "needs refit"
    """A tensor was put into the place of another; the next call points the program to it, which takes milliseconds."""
    NEEDS_RECOMPILE = "needs recompile"
    """A shape, a dtype, an attribute or a part is another one, or nothing was compiled yet; the next call exports the
    module, and compiles it unless the program is in the cache."""


def compile(  # noqa: A001  (torch's name)
    module: torch.nn.Module,
    *,
    cache_dir: str | os.PathLike[str] | ProgramCache | None = None,
    dynamic_shapes: Any = None,
    options: Mapping[str, Any] | None = None,
    new_inputs: Literal["compile", "refuse"] = "compile",
    replicas: int = 1,
    freeze: bool = False,
) -> LiveModule:
    """Make a module that runs compiled, follows the given one, and compiles nothing that was compiled before.

    The result is called as the module is. Its first call exports the module and compiles it, which takes seconds to
    minutes; the program goes into a cache on disk, without weights. Any model of the same architecture, in any
    process, then exports (about a second) and takes the program from there, whatever its weights and their names are.

    **It follows the module.** The program computes with the module's own storages, so what is changed in place
    (`optimizer.step()`, `copy_`, `load_state_dict`) is there at the next call, and buffers that the program writes to
    are the module's. A tensor that was replaced (`fc.weight = ...`, `load_state_dict(assign=True)`, `p.data = ...`) is
    found at the next call; it costs milliseconds. Another shape, dtype, attribute, hook or part means an export, and a
    compilation unless the program is known. `weights_state` tells which of these the next call will do, and a line in
    the log `reweft.torch` why it was done. Nothing else may move or free the storages while a call runs.

    **What it cannot see**: changes inside objects other than lists, dicts and plain objects that the module holds
    (numpy arrays, objects with slots), changes of classes and globals, and of torch's global settings. Python code in
    `forward` and in hooks runs when the module is exported, and not at each call.

    It computes without gradients. It falls back to the module itself, with a warning, in training mode, under
    autocast, and for inputs that require a gradient while gradients are computed.

    Args:
        module: The module, on the CPU.
        cache_dir: A folder for programs, or a `ProgramCache`. None means the user's.
        dynamic_shapes: Which sizes may vary, as for `torch.export.export`; for the first kind of inputs. Calls that
            do not fit are compiled for their own sizes.
        options: Settings of `torch._inductor.config`, as for `trace`.
        new_inputs: What to do for inputs that no program takes yet: compile one more ("compile"; all share the
            weights), or raise a `MismatchError` after the first ("refuse").
        replicas: Calls that may run at the same time.
        freeze: Compile with the compiler's freezing, as `trace(freeze=True)` does: faster programs, whose rows are made
            of the weights. What is changed in place does not reach them by itself, so each call compares all weights
            with a copy of those that the rows were made of, bit by bit, and makes the rows anew if one differs. That
            takes the weights' size of memory and time for reading them twice; it pays for models that compute much
            with few weights, such as convolutions.

    Raises:
        UsageError: An option would put weights into the code, or an argument makes no sense.

    Example:
        >>> compiled = compile(net.eval())  # doctest: +SKIP
        >>> y = compiled(x)  # doctest: +SKIP
        >>> optimizer.step(); y = compiled(x)  # the new weights  # doctest: +SKIP
    """
    if new_inputs not in {"compile", "refuse"}:
        raise UsageError(f'new_inputs is {new_inputs!r}, wanted "compile" or "refuse"')
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"compile takes a module, not a {type(module).__name__}", hint="trace takes functions")
    if isinstance(module, LiveModule):
        module = module._live.module  # noqa: SLF001  (one file)
    cache = cache_dir if isinstance(cache_dir, ProgramCache) else ProgramCache(cache_dir)
    own = dict(options or {})
    settings = compiler_settings(own, None)
    chosen = _Options(cache, dynamic_shapes, own, settings, new_inputs == "compile", replicas, freeze)
    return LiveModule(_Live(module, chosen))


def load_compiled(
    module: torch.nn.Module, folder: str | os.PathLike[str], *, dynamic_shapes: Any = None, replicas: int = 1
) -> LiveModule:
    """Fill a module with the weights that `save_compiled` wrote, and follow it with the programs beside them.

    Args:
        module: A module of the architecture that was saved, on the CPU.
        folder: The folder.
        dynamic_shapes: As they were for `compile`.
        replicas: Calls that may run at the same time.

    Raises:
        MismatchError: The weights are those of another architecture; the module is as it was.
        FormatError: The folder is none that `save_compiled` wrote, or a file in it is damaged; the module is as it was.
    """
    place = Path(folder)
    try:
        stated = json.loads((place / _OPTIONS).read_text())
        options, freeze = stated["options"], stated["freeze"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{place / _OPTIONS}: not what save_compiled writes: {error}") from error
    load_into(module, place / _WEIGHTS)
    return compile(
        module,
        cache_dir=place / _PROGRAMS,
        dynamic_shapes=dynamic_shapes,
        options=options,
        replicas=replicas,
        freeze=freeze,
    )


class LiveModule(torch.nn.Module):
    """A module that runs compiled; made by `compile`.

    It has the parameters, buffers, parts, attributes and methods of the module that it follows, and nothing of its own
    but `weights_state` and `save_compiled`: `state_dict`, `load_state_dict`, `to`, `train`, and writing an attribute do
    what they do there.
    """

    # Everything else is in the dict of the module, which both have.
    __slots__ = ("_live",)

    _live: _Live

    def __init__(self, live: _Live) -> None:
        # Not nn.Module's: it would clear the dict.
        object.__setattr__(self, "__dict__", live.module.__dict__)
        object.__setattr__(self, "_live", live)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, as the module would run.

        Raises:
            MismatchError: Inputs that no program takes, with `new_inputs="refuse"`.
            UnsupportedError: The module cannot be compiled, or holds tensors that cannot be followed.
            RunError: The program failed.
        """
        return self._live(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As a call."""
        return self._live(args, kwargs)

    @property
    def weights_state(self) -> WeightsState:
        """What the next call will have to do. Has no effects."""
        return self._live.look()[0]

    def save_compiled(self, folder: str | os.PathLike[str]) -> None:
        """Save the weights and the programs that were compiled so far, for `load_compiled`; no pickle is written.

        Writes `weights.safetensors`, the state_dict with what is tied once; `options.json`; and a package without
        weights for each program in `programs`, a few megabytes each. Each file appears whole or not at all.

        Raises:
            UnsupportedError: A program cannot be told from others, so that it could not be found again.
            IoError: The folder cannot be written to.
        """
        self._live.save(Path(folder))

    def __getattr__(self, name: str) -> Any:
        """Parameters and parts, and what the module's class has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._live.module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveModule:
        """Follow a copy of the module; its programs are in the cache."""
        return LiveModule(_Live(copy.deepcopy(self._live.module, memo), self._live.options))

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Refuse to be pickled.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "a compiled module holds native code, which no pickle can hold",
            hint="save_compiled and load_compiled write and read no pickle",
        )

    def __repr__(self) -> str:
        return f"LiveModule({self._live.module!r})"


def _delegate(name: str) -> None:
    """Let a public method do what the module's own class does, which may have another one than `torch.nn.Module`."""

    def method(self: LiveModule, *args: Any, **kwargs: Any) -> Any:
        module = self._live.module
        result = getattr(module, name)(*args, **kwargs)
        # `eval()`, `to()` and their like return what they were called on.
        return self if result is module else result

    method.__name__, method.__doc__ = name, getattr(torch.nn.Module, name).__doc__
    setattr(LiveModule, name, method)


for _name in dir(torch.nn.Module):
    if not _name.startswith("_") and _name != "forward" and callable(getattr(torch.nn.Module, _name)):
        _delegate(_name)


class _Program:
    """A program for one kind of inputs, and where its weights are in the module."""

    def __init__(
        self,
        model: CompiledModule,
        key: str | None,
        paths: list[str],
        literals: dict[str, torch.Tensor],
        *,
        is_frozen: bool,
    ) -> None:
        self.model = model
        self.key = key
        self._core = model._core  # noqa: SLF001  (one package)
        self._call = model._call  # noqa: SLF001
        numbers = [name for names in model.slots() for name in names]
        self._places = {name: paths[int(name[1:])] for name in numbers}
        self._literals = literals
        self._is_frozen = is_frozen
        self.written = {self._places[name] for name in model._core.written() if name in self._places}  # noqa: SLF001
        """Paths of the tensors that it writes to."""

    def run_fitting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """What it gives, alone in a tuple; None for arguments that are not just what it takes."""
        outputs = self._core.run_fitting(args) if self._call.is_flat and not kwargs else None
        return None if outputs is None else (self._call.results(outputs),)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """The same for arguments that can be made to fit; without gradients."""
        try:
            given = self._call.arguments(self._core, args, kwargs)
        except (MismatchError, UsageError):
            return None
        return (self._call.results(self._core.run(given)),)

    def point_to(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Compute with these storages from now on. Copies nothing.

        Raises:
            UnsupportedError: One of the tensors cannot be used where it is.
        """
        found = {path: tensors.get(path, self._literals.get(path)) for path in self._places.values()}
        missing = [path for path, value in found.items() if value is None]
        if missing:
            raise UnsupportedError(f"{missing[0]!r}: the module has no such tensor, and export found one")
        weights = {name: found[path] for name, path in self._places.items()}
        checkpoint = checkpoint_of({name: value for name, value in weights.items() if value is not None}, "module")
        report = report_of(
            self._core.refit(
                checkpoint._core,  # noqa: SLF001
                cast=False,
                missing=False,
                unused=False,
                lend=True,
                lend_written=True,
                keep_written=False,
            )
        )
        if report.bytes_copied and not self._is_frozen:
            raise UnsupportedError(f"some weights would be copied and not followed: {'; '.join(report.notices)}")


def _stays_in_place(value: torch.Tensor) -> bool:
    """Whether a program can compute with a tensor's own bytes: neither a copy nor what a copy is made of."""
    return value.data_ptr() % value.element_size() == 0 and not (value.is_conj() or value.is_neg())


@dataclass(frozen=True)
class _Options:
    """What `compile` was asked for."""

    cache: ProgramCache
    dynamic_shapes: Any
    own: dict[str, Any]
    """The compiler's settings that the caller chose."""
    settings: dict[str, Any]
    """All of them."""
    compiles_new_inputs: bool
    replicas: int
    freeze: bool


class _Live:
    """What a compiled module knows of the module that it follows."""

    def __init__(self, module: torch.nn.Module, options: _Options) -> None:
        self.module = module
        self.options = options
        # Held while programs are made or pointed to other weights; calls read `_watch` and `_programs` without it.
        self._lock = threading.RLock()
        self._facts: Facts | None = None
        self._watch: _core.Watch | None = None
        self._programs: tuple[_Program, ...] = ()
        # The weights that rows of frozen programs were made of, and copies of what they were.
        self._made_of: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._fell_back: str | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.module.training or torch.is_autocast_enabled("cpu"):
            return self._eager("it is in training mode" if self.module.training else "autocast is on", args, kwargs)
        watch = self._watch
        if watch is None or watch.moved() or watch.changed() or self._is_stale():
            self._follow()
        for program in self._programs:
            if (result := program.run_fitting(args, kwargs)) is not None:
                self._fell_back = None
                return result[0]
        if torch.is_grad_enabled() and any(_wants_gradient(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            return self._eager("an input requires a gradient", args, kwargs)
        self._fell_back = None
        for program in self._programs:
            if (result := program.run(args, kwargs)) is not None:
                return result[0]
        return self._compiled_for(args, kwargs)

    def look(self) -> tuple[WeightsState, str]:
        """What the next call has to do, and why."""
        with self._lock:
            if self._watch is None or self._facts is None or not self._programs:
                return WeightsState.NEEDS_RECOMPILE, "nothing was compiled yet"
            if not (self._watch.moved() or self._watch.changed()):
                return (WeightsState.NEEDS_REFIT, "changed in place") if self._is_stale() else (WeightsState.LIVE, "")
            now = Facts(self.module)
            if (why := self._facts.difference(now)) is not None:
                return WeightsState.NEEDS_RECOMPILE, why
            if (why := self._facts.moved(now)) is not None:
                return WeightsState.NEEDS_REFIT, why
            return (WeightsState.NEEDS_REFIT, "changed in place") if self._is_stale() else (WeightsState.LIVE, "")

    def save(self, folder: Path) -> None:
        """Write weights, options and programs.

        Raises:
            UnsupportedError: A program has no key.
        """
        with self._lock:
            if any(program.key is None for program in self._programs):
                what = f"{self._name}: a program depends on something that cannot be written down"
                raise UnsupportedError(what, hint="the log `reweft.torch` says on what")
            (folder / _PROGRAMS).mkdir(mode=0o700, parents=True, exist_ok=True)
            state = self.module.state_dict(keep_vars=True)
            once = {id(value): name for name, value in reversed(list(state.items()))}
            save_file({name: state[name].detach() for name in sorted(once.values())}, folder / _WEIGHTS)
            options = {"options": self.options.own, "freeze": self.options.freeze}
            (folder / _OPTIONS).write_text(json.dumps(options))
            for program in self._programs:
                save(program.model, folder / _PROGRAMS / f"{program.key}.pt2", inline_weights=False)

    def _follow(self) -> None:
        """Bring the programs to what the module is now.

        Raises:
            ReweftError: A tensor cannot be followed; the next call exports the module.
        """
        with self._lock:
            state, why = self.look()
            if state is WeightsState.NEEDS_RECOMPILE:
                if self._programs:
                    _log.info("%s: needs recompile: %s", self._name, why)
                self._forget()
                return
            if state is WeightsState.NEEDS_REFIT:
                begun = time.perf_counter()
                tensors = self._tensors()
                try:
                    self._remember(tensors, self._programs)
                    for program in self._programs:
                        program.point_to(tensors)
                except ReweftError:
                    # Some may have the new weights and some the old ones.
                    self._forget()
                    raise
                _log.info("%s: refitted in %.1f ms: %s", self._name, (time.perf_counter() - begun) * 1e3, why)
            self._note()

    def _forget(self) -> None:
        self._programs, self._watch, self._facts, self._made_of = (), None, None, []

    def _remember(self, tensors: Mapping[str, torch.Tensor], programs: tuple[_Program, ...]) -> None:
        """Copy what rows are about to be made of, if they are."""
        if self.options.freeze:
            written = set[str]().union(*(program.written for program in programs))
            once = {id(value): value for path, value in tensors.items() if path not in written}
            self._made_of = [(value, value.detach().clone()) for value in once.values()]

    def _is_stale(self) -> bool:
        """Whether a weight has other bits than the rows of frozen programs were made of."""
        return any(not same_bytes(now, then) for now, then in self._made_of)

    def _note(self) -> None:
        """Note what the module is now."""
        self._facts = Facts(self.module)
        self._watch = watched(self.module)

    def _eager(self, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._fell_back != why:
            self._fell_back = why
            warnings.warn(f"{self._name} is run uncompiled: {why}", stacklevel=4)
        return self.module(*args, **kwargs)

    def _compiled_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a program for these inputs, and run it.

        Raises:
            MismatchError: No more programs are to be made.
            UnsupportedError: The program differs from what was exported.
        """
        with self._lock:
            # Another thread may have made it meanwhile, or the module may have changed.
            self._follow()
            for program in self._programs:
                if (result := program.run(args, kwargs)) is not None:
                    return result[0]
            if self._programs and not self.options.compiles_new_inputs:
                self._refuse(args, kwargs)
            tensors = self._tensors()
            program = self._program(args, kwargs, tensors)
            self._remember(tensors, (program, *self._programs))
            for one in (program, *self._programs) if self.options.freeze else (program,):
                one.point_to(tensors)
            self._note()
            self._programs = (program, *self._programs)
        result = program.run(args, kwargs)
        if result is None:
            raise UnsupportedError(f"{self._name}: the program does not take the inputs that it was compiled for")
        return result[0]

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """Raise what the newest program says of the inputs.

        Raises:
            MismatchError: With the reason.
        """
        first = self._programs[0]
        try:
            first._call.arguments(first._core, args, kwargs)  # noqa: SLF001  (one file)
        except (MismatchError, UsageError) as error:
            raise MismatchError(
                f"{self._name} was compiled for other inputs: {error}",
                hint='new_inputs="compile" compiles for them too',
            ) from error
        raise MismatchError(f"{self._name} was compiled for other inputs")

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the module, of a kind that can be followed.

        Raises:
            UnsupportedError: One is not; the message has its own name.
        """
        tensors = tensors_of(self.module)
        checkpoint_of(tensors, self._name)
        if moving := [path for path, value in tensors.items() if not _stays_in_place(value)]:
            raise UnsupportedError(
                f"these weights cannot be followed where they are: {', '.join(moving)}",
                hint="they begin at no multiple of their element size, or are lazily conjugated or negated; clone them",
            )
        return tensors

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any], own: Mapping[str, torch.Tensor]) -> _Program:
        """A program for these inputs, from the cache or from the compiler.

        Raises:
            UnsupportedError: It was to be frozen, and could not be refitted exactly.
        """
        _warn_of_hooks(self.module, self._name)
        begun = time.perf_counter()
        with torch.no_grad():
            # Only the first kind of inputs has the sizes that the caller spoke of.
            program = exported(self.module, args, kwargs, None if self._programs else self.options.dynamic_shapes)
        leaves = flatten(program.call_spec.in_spec, args, kwargs)
        literals = {
            path: value for path, value in {**program.state_dict, **program.constants}.items() if path not in own
        }
        paths = number_weights(program)
        try:
            key = key_of(program, leaves, {**self.options.settings, "freezing": self.options.freeze})
        except NoKeyError as error:
            _log.info("%s: the program is not kept: %s", self._name, error)
            key = None
        try:
            model, how = self._model(key, program, leaves)
        except Refused as error:
            named = re.sub(r"\bw(\d+)\b", lambda found: paths[int(found[1])], str(error))
            raise UnsupportedError(f"{self._name} cannot be frozen: {named}") from error
        _log.info("%s: %s in %.2f s (program %s)", self._name, how, time.perf_counter() - begun, (key or "none")[:12])
        return _Program(model, key, paths, literals, is_frozen=self.options.freeze)

    def _model(self, key: str | None, program: ExportedProgram, leaves: list[object]) -> tuple[CompiledModule, str]:
        if key is None:
            return self._made(None, program, leaves), "compiled"
        if (model := self._cached(key)) is not None:
            return model, "taken from the cache"
        with self.options.cache.compiling(key):
            # Whoever held the lock before has made it.
            if (model := self._cached(key)) is not None:
                return model, "taken from the cache"
            return self._made(key, program, leaves), "compiled"

    def _cached(self, key: str) -> CompiledModule | None:
        """The program of that key, if the cache has it; what is damaged is removed."""
        path = self.options.cache.get(key)
        if path is None:
            return None
        try:
            model = load(path, replicas=self.options.replicas)
            # A file may have been renamed.
            why = None if model._core.program() == key else f"{path}: it is another program"  # noqa: SLF001
        except ReweftError as error:
            why = str(error)
        if why is None:
            return model
        warnings.warn(f"a program of the cache is not used: {why}", stacklevel=6)
        self.options.cache.drop(key)
        return None

    def _made(self, key: str | None, program: ExportedProgram, leaves: list[object]) -> CompiledModule:
        """Compile; the package goes into the cache without its weights.

        Raises:
            UnsupportedError: A weight's value would be in the code.
        """
        with torch.no_grad(), tempfile.TemporaryDirectory(prefix="reweft-") as folder:
            stated = origins(program, leaves, self.module, "any")
            # The module gives it every weight at every refit, so none is the program's own.
            weights = [replace(origin, persistent=True) for origin in stated.tensors]
            stated = replace(stated, tensors=weights, program=key)
            names = {origin.names[0]: True for origin in weights}
            frozen = Frozen(program, names) if self.options.freeze else None
            package = compiled_package(program, stated, self.options.settings, Path(folder), frozen=frozen)
            if any(origin.used for origin in weights):
                sealed, package = package, Path(folder) / "stripped.pt2"
                _core.strip(sealed, package, [])
            if key is not None:
                self.options.cache.put(key, package)
            # The loader maps the package, which keeps the bytes when the folder goes.
            model = load(package, replicas=self.options.replicas)
        if absent := model.refittable().unrefittable:
            raise UnsupportedError(f"{self._name}: some weights were compiled into the code: {absent}")
        return model

    @property
    def _name(self) -> str:
        return type(self.module).__name__


def _wants_gradient(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _warn_of_hooks(module: torch.nn.Module, name: str) -> None:
    """Say that hooks run once: what they compute is compiled in, what else they do is not."""
    for path, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:  # noqa: SLF001  (torch has no public name)
            where = f"{name}.{path}" if path else name
            warnings.warn(
                f"{where} has forward hooks, which run when it is compiled and not at each call", stacklevel=7
            )
            return
