"""Put new weights into compiled models: exactly, all or nothing, without recompiling.

`open` reads checkpoints without running them, `load_config` what they hold beside tensors, `convert` writes
safetensors, `plan`, `refit` and `verify` put a checkpoint's weights into a compiled package and show that they are
there. None of this imports torch; `reweft.torch` traces, runs and refits live models.
"""

from __future__ import annotations

from reweft.checkpoint import Checkpoint, TensorInfo, open  # noqa: A004  (`reweft.open` is the name)
from reweft.config import ConfigDict, ConfigName, ConfigObject, load_config
from reweft.diff import AbsentTensor, ChangedTensor, ChangedValue, DiffReport, TiedTensors, UnreadableTensor, diff
from reweft.errors import (
    FormatError,
    IoError,
    KeyCollisionError,
    LimitError,
    MismatchError,
    NotFoundError,
    ReweftError,
    RunError,
    UnsupportedError,
    UsageError,
)
from reweft.keymap import KeyMap, KeyReport
from reweft.limits import Limits
from reweft.refitting import (
    ConvertReport,
    Finding,
    Plan,
    RefitReport,
    StripReport,
    VerifyReport,
    convert,
    extract,
    plan,
    refit,
    strip,
    verify,
)

__all__ = [
    "AbsentTensor",
    "ChangedTensor",
    "ChangedValue",
    "Checkpoint",
    "ConfigDict",
    "ConfigName",
    "ConfigObject",
    "ConvertReport",
    "DiffReport",
    "Finding",
    "FormatError",
    "IoError",
    "KeyCollisionError",
    "KeyMap",
    "KeyReport",
    "LimitError",
    "Limits",
    "MismatchError",
    "NotFoundError",
    "Plan",
    "RefitReport",
    "ReweftError",
    "RunError",
    "StripReport",
    "TensorInfo",
    "TiedTensors",
    "UnreadableTensor",
    "UnsupportedError",
    "UsageError",
    "VerifyReport",
    "convert",
    "diff",
    "extract",
    "load_config",
    "open",
    "plan",
    "refit",
    "strip",
    "verify",
]
