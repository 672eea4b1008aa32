"""Frozen programs: compiled as fast as the compiler can, with weights that can still be replaced exactly.

Nothing here is taken on trust. The recipes must make the package's own rows from the weights that were compiled; and
the code is generated once more from other weights, which must give the same code, and rows that the recipes make from
those weights. What freezing does of its own accord with a value would show in one of the two.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import codecache

from reweft import _core
from reweft.errors import ReweftError
from reweft.torch.folding import Recorder, Refused, place_of
from reweft.torch.replay import capability
from reweft.torch.tensors import checkpoint_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch.export import ExportedProgram

__all__ = ["Frozen"]

# Seed of the weights that code is generated from once more.
_SEED = 271828


class _Generated(Exception):  # noqa: N818  (it is no error)
    """The code is there, and need not be compiled."""


@dataclass
class Frozen:
    """The freezing of one program."""

    program: ExportedProgram
    persistent: Mapping[str, bool]
    """The first name of every tensor of the module, and whether a state_dict has it."""
    compare: bool = True
    """Generate the code once more, from other weights."""
    _recipes: dict[str, Any] = field(default_factory=dict)
    _others: dict[str, torch.Tensor] = field(default_factory=dict)
    """Other weights, and the rows that the compiler made of them."""
    _other_rows: dict[str, bytes] = field(default_factory=dict)

    def compile(self, run: Callable[[Mapping[str, Any]], None], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Compile, and give what was recorded meanwhile, for the package's manifest.

        Args:
            run: Compiles the program with settings.
            settings: The compiler's.

        Raises:
            Refused: A refit could not be exact.
        """
        weights = self._weights(self.program)
        recorder, texts = Recorder(weights), list[tuple[str, str]]()
        with recorder, _generated(texts, stop=False):
            run(recorder.settings(settings))
        recipes = recorder.recipes()
        self._recipes = recipes
        if self.compare:
            self._generate_again(settings, texts, recorder)
        named = {step["key"]: None for steps in recipes.values() for step in steps if step["op"] == "leaf"}
        every = self._all(self.program)
        return {
            "capability": capability(),
            "compared": self.compare,
            "recipes": recipes,
            "originals": {name: every[name] for name in named},
            "fixed": {name: every[name] for name in every if name not in weights},
            "rows": recorder.rows.keys() - recipes.keys(),
        }

    def seal(self, fresh: Path, stated: str, package: Path) -> None:
        """Put the manifest in, and hold the recipes against the package: every row is made, from both kinds of weights.

        Raises:
            Refused: They do not fit the package, or a row comes out with other bytes.
        """
        try:
            _core.seal(fresh, stated, package)
        except ReweftError as error:
            # The package is the compiler's own, so it is the recipes that do not fit it.
            raise Refused(f"what was recorded does not make the package's rows: {error}") from error
        if not self.persistent:
            return
        if wrong := self._differences(package):
            raise Refused("the engine makes other bytes than the compiler did: " + "; ".join(wrong))
        threads = torch.get_num_threads()
        if threads > 1 and any(step["op"] == "torch" for steps in self._recipes.values() for step in steps):
            torch.set_num_threads(1)
            try:
                wrong = self._differences(package)
            finally:
                torch.set_num_threads(threads)
            if wrong:
                raise Refused("its bytes depend on the number of threads: " + "; ".join(wrong))

    def _differences(self, package: Path) -> list[str]:
        try:
            plan = self._plan(package, self._all(self.program))
        except ReweftError as error:
            return [str(error)]
        found = json.loads(_core.verify(plan))
        wrong = [f"{row['slot'] or row['key']}: {row['what']}" for row in found["differences"]]
        if self._other_rows:
            plan = self._plan(package, self._others)
            for name, wanted in self._other_rows.items():
                made = plan.make(name)
                # A row is padded with zeros.
                if made is None or bytes(made).ljust(len(wanted), b"\0").rstrip(b"\0") != wanted.rstrip(b"\0"):
                    wrong.append(f"{name}: it differs for other weights")
        return wrong

    def _plan(self, package: Path, weights: Mapping[str, torch.Tensor]) -> _core.Plan:
        checkpoint = checkpoint_of(weights, "the weights that were compiled")._core  # noqa: SLF001  (one package)
        return _core.plan(package, checkpoint, original=None, cast=False, missing=False, unused=True)

    def _all(self, program: ExportedProgram) -> dict[str, torch.Tensor]:
        """The tensors of the module, by their first name."""
        every = {**program.state_dict, **program.constants}
        return {name: every[name].detach() for name in self.persistent}

    def _weights(self, program: ExportedProgram) -> dict[str, torch.Tensor]:
        """Those that a state_dict has.

        What the compiler folds of the others is a part of the program: a refit may lack them, and has to leave them as
        they are.
        """
        return {name: value for name, value in self._all(program).items() if self.persistent[name]}

    def _generate_again(self, settings: Mapping[str, Any], texts: list[tuple[str, str]], first: Recorder) -> None:
        """Generate the code from other weights.

        Raises:
            Refused: It is other code.
        """
        program = copy.deepcopy(self.program)
        _perturb(list(self._weights(program).values()))
        self._others = self._all(program)
        recorder, others = Recorder(self._weights(program)), list[tuple[str, str]]()
        with recorder, _generated(others, stop=True):
            torch._inductor.aoti_compile_and_package(  # noqa: SLF001
                program, package_path="unused.pt2", inductor_configs=recorder.settings(settings)
            )
        if others != texts:
            raise Refused("the compiler generates other code for other weights, so a value went into it")
        if recorder.rows.keys() != first.rows.keys():
            raise Refused("the compiler makes other constants for other weights")
        self._other_rows = {name: _row(recorder.rows[name]) for name in self._recipes}


@contextlib.contextmanager
def _generated(texts: list[tuple[str, str]], *, stop: bool) -> Iterator[None]:
    """Take note of the code that is generated; do not compile it if it is to `stop` there."""
    compiler: Any = codecache.AotCodeCompiler
    compile_code = compiler.compile

    def noted(graph: Any, wrapper: str, kernel: str, *args: Any, **kwargs: Any) -> Any:
        texts.append((wrapper, kernel))
        if stop:
            raise _Generated
        return compile_code(graph, wrapper, kernel, *args, **kwargs)

    compiler.compile = noted
    try:
        yield
    except Exception:
        # The compiler wraps what is raised in it.
        if not (stop and texts):
            raise
    finally:
        compiler.compile = compile_code


def _perturb(tensors: list[torch.Tensor]) -> None:
    """Change every tensor in place, so that no value is special and each stays in its range.

    Signs are kept; integers, which may be indices, change places with each other.
    """
    generator = torch.Generator().manual_seed(_SEED)
    done: set[tuple[Any, ...]] = set()
    for value in tensors:
        where = place_of(value)
        if where in done or not value.numel():
            continue
        done.add(where)
        with torch.no_grad():
            if value.is_floating_point() or value.is_complex():
                noise = torch.rand(value.shape, generator=generator).to(value.dtype)
                value.copy_(torch.where(value == 0, noise / 100, value * (1 + noise / 10)))
            else:
                order = torch.randperm(value.numel(), generator=generator)
                value.copy_(value.reshape(-1)[order].reshape(value.shape))


def _row(value: torch.Tensor) -> bytes:
    """The bytes of a constant as the compiler writes them."""
    if value.is_mkldnn:
        nbytes, address = torch.ops.mkldnn._nbytes(value), torch.ops.mkldnn.data_ptr(value)  # noqa: SLF001
        return ctypes.string_at(address, nbytes)
    storage = value.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
