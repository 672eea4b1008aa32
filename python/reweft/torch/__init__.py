"""Trace, run and refit live models. The only part of reweft that imports torch.

`trace` compiles a module so that every weight can be replaced, `save` and `load` move it to and from `.pt2` packages
that torch's own loader reads too, `replace_weights` puts new weights into a model that is serving,
`refit_module_weights` makes a second model with other weights, and `load_into` puts weights into an ordinary module.
`compile` makes a module that runs compiled and follows the module that it was made of.
"""

from __future__ import annotations

from reweft.torch.batching import dynamic_batch
from reweft.torch.compiled import CompiledModule, Refittable, ReplaceReport, load, replace_weights, save
from reweft.torch.files import load_file, save_file
from reweft.torch.host import HostWarning
from reweft.torch.live import LiveModule, WeightsState, compile, load_compiled  # noqa: A004  (torch's name)
from reweft.torch.loading import IncompatibleKeys, load_into
from reweft.torch.programs import ProgramCache
from reweft.torch.refitting import refit_module_weights
from reweft.torch.replay import lend
from reweft.torch.tensors import checkpoint_of, tensor
from reweft.torch.tracing import trace

__all__ = [
    "CompiledModule",
    "HostWarning",
    "IncompatibleKeys",
    "LiveModule",
    "ProgramCache",
    "Refittable",
    "ReplaceReport",
    "WeightsState",
    "checkpoint_of",
    "compile",
    "dynamic_batch",
    "load",
    "load_compiled",
    "load_file",
    "load_into",
    "refit_module_weights",
    "replace_weights",
    "save",
    "save_file",
    "tensor",
    "trace",
]

lend()
del lend
