"""Plans, refits, comparisons and conversions of files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reweft import _core
from reweft.checkpoint import Checkpoint
from reweft.checkpoint import open as open_checkpoint

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from reweft.keymap import KeyMap

__all__ = [
    "ConvertReport",
    "Finding",
    "Plan",
    "RefitReport",
    "StripReport",
    "VerifyReport",
    "convert",
    "extract",
    "plan",
    "refit",
    "strip",
    "verify",
]


@dataclass(frozen=True)
class Finding:
    """One thing to know before a refit."""

    kind: str
    """`missing`, `unused`, `not-read`, `baked`, `unrefittable`, `unreadable`, `shape`, `dtype`, `tied`, `value`."""
    blocking: bool
    """Whether it stops a refit."""
    slot: str | None
    """The slot, if it is about one."""
    key: str | None
    """The key, if it is about one."""
    what: str
    """What it says."""
    found: str | None
    """Dtype and shape in the checkpoint."""
    wanted: str | None
    """Dtype and shape of the slot."""
    hint: str | None
    """What to do about it."""


@dataclass(frozen=True)
class RefitReport:
    """What a refit did."""

    out: Path
    """The file that was written, or the model that was refitted."""
    slots: int
    """Slots that keys filled."""
    slots_changed: int
    """Of these, slots whose bytes are other than before."""
    kept: tuple[str, ...]
    """Slots that kept their bytes."""
    nbytes: int
    """Bytes that were filled in."""
    notices: tuple[str, ...]
    """What a careful reader should know."""


@dataclass(frozen=True)
class VerifyReport:
    """What a comparison found."""

    equal: bool
    """Whether every slot holds its key's bytes."""
    slots: int
    """Slots that were compared."""
    nbytes: int
    """Bytes that were compared."""
    differences: tuple[Finding, ...]
    """Slots that differ, and what stood against a comparison."""


@dataclass(frozen=True)
class StripReport:
    """What stripping did."""

    out: Path
    """The file that was written."""
    slots: int
    """Slots whose bytes were left out."""
    nbytes: int
    """Bytes that were left out."""
    kept: tuple[str, ...]
    """Slots that kept their bytes."""
    out_nbytes: int
    """Bytes of the file that was written."""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    out: Path
    """The file to open: what was asked for, or the index of its shards."""
    files: tuple[Path, ...]
    """All files that were written, `out` last."""
    tensors: int
    """Tensors in them."""
    nbytes: int
    """Bytes of all tensors."""
    dropped_aliases: dict[str, str]
    """Keys left out because another key has the same bytes, with that key."""
    not_carried: tuple[str, ...]
    """What the checkpoint holds that is no tensor."""
    notices: tuple[str, ...]
    """What a careful reader should know."""


class Plan:
    """The checked list of replacements that `plan` made. Nothing has been written."""

    def __init__(self, core: _core.Plan) -> None:
        self._core = core
        self._data: dict[str, Any] = json.loads(core.to_json())

    @property
    def findings(self) -> list[Finding]:
        """Everything that was found, blocking or not."""
        return [Finding(**finding) for finding in self._data["findings"]]

    @property
    def recipes(self) -> dict[str, list[dict[str, Any]]]:
        """For every slot that gets new bytes, the steps that make them."""
        return {refill["name"]: refill["recipe"] for refill in self._data["refills"]}

    @property
    def kept(self) -> list[str]:
        """Slots that stay as they are."""
        return list(self._data["kept"])

    @property
    def ok(self) -> bool:
        """Whether nothing stops a refit."""
        return not any(finding["blocking"] for finding in self._data["findings"])

    def check(self) -> None:
        """Do nothing if the plan can be carried out.

        Raises:
            MismatchError: A finding blocks it; the message lists all that do.
        """
        self._core.check()

    def to_json(self) -> str:
        """The whole plan as JSON."""
        return self._core.to_json()

    def __len__(self) -> int:
        return len(self._core)

    def __repr__(self) -> str:
        state = "ok" if self.ok else f"{sum(finding.blocking for finding in self.findings)} findings block it"
        return f"<Plan {self._data['checkpoint']!r} -> {self._data['artifact']!r}: {len(self)} slots, {state}>"


def _opened(
    checkpoint: str | os.PathLike[str] | Checkpoint, top_level_key: str | None, keys: KeyMap | None
) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        if top_level_key is not None:
            raise TypeError("top_level_key belongs to the call that opened the checkpoint")
        return checkpoint if keys is None else checkpoint.rekey(keys)
    return open_checkpoint(checkpoint, top_level_key=top_level_key, keys=keys)


def plan(
    artifact: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    original: str | os.PathLike[str] | Checkpoint | None = None,
    allow_cast: bool = False,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> Plan:
    """Match the slots of `artifact` with the keys of `checkpoint` and say everything that speaks against it.

    Reads metadata, and the bytes of tied keys that the checkpoint stores more than once; with `original`, all weights
    of both.

    Args:
        artifact: A compiled `.pt2` package, an exported program, a TorchScript archive, a library beside its
            `.wrapper.cpp`, or a checkpoint.
        checkpoint: A file, or a checkpoint that `reweft.open` gave.
        top_level_key: Dotted path of the dict that holds the weights.
        keys: Rules from keys to slot names; None means identical names.
        original: The weights that `artifact` was compiled with. A slot that holds something else under one of their
            names, because the compiler made it of several weights, blocks the plan.
        allow_cast: Convert between float dtypes, rounding to nearest even.
        allow_missing: Leave slots as they are for which there is no key.
        allow_unused: Leave out keys for which there is no slot.

    Raises:
        FormatError: A file is damaged.
        UnsupportedError: A file is of a kind that reweft does not handle.
        IoError: A file cannot be read.
    """
    opened = _opened(checkpoint, top_level_key, keys)
    before = None if original is None else _opened(original, None, keys)
    core = _core.plan(
        artifact,
        opened._core,  # noqa: SLF001  (one package)
        original=None if before is None else before._core,  # noqa: SLF001
        cast=allow_cast,
        missing=allow_missing,
        unused=allow_unused,
    )
    return Plan(core)


def refit(
    artifact: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    out: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    original: str | os.PathLike[str] | Checkpoint | None = None,
    allow_cast: bool = False,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> RefitReport:
    """Put the tensors of `checkpoint` into the slots of a copy of `artifact`, or of `artifact` itself.

    A copy is written once and appears whole or not at all; it may be `artifact` itself, which is then replaced by a
    rename. In place only what differs is written, after a journal beside the file: a rewrite that is cut short is
    finished when reweft opens the file the next time. Buffers are of some MiB, but for tensors that must be rearranged.

    Args:
        artifact: A compiled `.pt2` package, an exported program, a TorchScript archive, a library beside its
            `.wrapper.cpp`, or a checkpoint.
        checkpoint: A file, or a checkpoint that `reweft.open` gave.
        out: The file to write.
        in_place: Write into `artifact` and no copy; refused while a process has it mapped.
        top_level_key: Dotted path of the dict that holds the weights.
        keys: Rules from keys to slot names; None means identical names.
        original: As for `plan`.
        allow_cast: Convert between float dtypes, rounding to nearest even.
        allow_missing: Leave slots as they are for which there is no key.
        allow_unused: Leave out keys for which there is no slot.

    Raises:
        MismatchError: A slot and its tensor differ in shape or dtype, a slot or key is left over, tied keys differ, or
            a weight was compiled into the code. Nothing has been written.
        UsageError: A process has the file mapped or rewrites it, or the checkpoint lies in it.
        FormatError: A file is damaged; `out` is as it was.
        UnsupportedError: A file is of a kind that reweft does not handle.
        IoError: Reading or writing failed; `out` is as it was.
        TypeError: Both of `out` and `in_place` were given, or neither.
    """
    if (out is None) != in_place:
        raise TypeError("refit takes out= for a copy, or in_place=True")
    planned = plan(
        artifact,
        checkpoint,
        top_level_key=top_level_key,
        keys=keys,
        original=original,
        allow_cast=allow_cast,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    return refit_report(_core.refit(planned._core, out))  # noqa: SLF001  (one package)


def refit_report(text: str) -> RefitReport:
    """Make a report of the JSON that the engine gives."""
    data = json.loads(text)
    return RefitReport(
        out=Path(data["out"]),
        slots=data["slots"],
        slots_changed=data["slots_changed"],
        kept=tuple(data["kept"]),
        nbytes=data["nbytes"],
        notices=tuple(data["notices"]),
    )


def verify(
    artifact: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    allow_cast: bool = False,
    allow_missing: bool = False,
    allow_unused: bool = False,
) -> VerifyReport:
    """Compare the slots of `artifact` with the tensors of `checkpoint`, byte for byte.

    Reads all weight bytes of both. Arguments are those of `plan`.

    Raises:
        FormatError: A file is damaged.
        UnsupportedError: A file is of a kind that reweft does not handle.
        IoError: A file cannot be read.
    """
    planned = plan(
        artifact,
        checkpoint,
        top_level_key=top_level_key,
        keys=keys,
        allow_cast=allow_cast,
        allow_missing=allow_missing,
        allow_unused=allow_unused,
    )
    data = json.loads(_core.verify(planned._core))  # noqa: SLF001  (one package)
    differences = tuple(Finding(**finding) for finding in data["differences"])
    return VerifyReport(data["equal"], data["slots"], data["nbytes"], differences)


def strip(artifact: str | os.PathLike[str], out: str | os.PathLike[str], *, keep: Iterable[str] = ()) -> StripReport:
    """Write `artifact` without its weights, for whoever ships the program once and weights often.

    Nothing runs or loads what is written. `refit` with a key for every slot that was left out makes of it, byte for
    byte, what it makes of the whole artifact. Slots that no refit can fill keep their bytes, and so do those that no
    state_dict has, as far as the artifact says which those are: a package that `reweft.torch.trace` compiled does,
    others do not. Reads all weight bytes twice and compares their CRCs.

    Args:
        artifact: A compiled `.pt2` package, an exported program, a TorchScript archive, or a checkpoint.
        out: The file to write.
        keep: Regexes; a slot with a name that one of them matches keeps its bytes.

    Raises:
        UsageError: The artifact is stripped already or has no slots to strip, or a regex matches no slot.
        UnsupportedError: The file is no artifact, is a library beside its source, or has no weights in it.
        FormatError: The file is damaged.
        IoError: Reading or writing failed; `out` is as it was.

    Example:
        >>> reweft.strip("net.pt2", "net.stripped")  # doctest: +SKIP
        >>> reweft.refit("net.stripped", "epoch3.pt", out="net-epoch3.pt2")  # doctest: +SKIP
    """
    data = json.loads(_core.strip(artifact, out, list(keep)))
    return StripReport(
        out=Path(data["out"]),
        slots=data["slots"],
        nbytes=data["nbytes"],
        kept=tuple(data["kept"]),
        out_nbytes=data["out_nbytes"],
    )


def convert(
    checkpoint: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    *,
    top_level_key: str | None = None,
    keys: KeyMap | None = None,
    dtype: str | None = None,
    format: Literal["safetensors", "pt", "npz"] | None = None,  # noqa: A002  (what it is called everywhere)
    shared: Literal["error", "duplicate", "drop-aliases"] = "error",
    max_shard_size: int | str | None = None,
    sync: bool = True,
) -> ConvertReport:
    """Write a checkpoint in another format, or under other keys.

    Checks every CRC of what it reads. Memory does not grow with the model, except that a transposed tensor is held
    whole. `out` appears whole or not at all.

    Args:
        checkpoint: A file, or a checkpoint that `reweft.open` gave.
        out: The file to write.
        top_level_key: Dotted path of the dict that holds the weights.
        keys: Which keys, under which names.
        dtype: Convert float tensors to this dtype, rounding to nearest even as torch does; the others stay, and a
            notice names them.
        format: The format to write; None goes by the extension of `out`: `.safetensors`; `.pt`, `.pth` and `.bin` for
            what `torch.load` reads with `weights_only=True`, shared storages and strides kept; `.npz` for `numpy.load`.
        shared: What to do with tensors that share bytes, where the format cannot say so: refuse, write the bytes for
            each key, or write only the first key.
        max_shard_size: Most bytes of tensors in one file, as a number or as "5GB" or "5GiB". If they do not fit one,
            `net.safetensors` becomes `net-00001-of-00002.safetensors` and so on with `net.safetensors.index.json`,
            which takes its name last. Tensors that share bytes go into one file, a larger tensor into one of its own.
        sync: Wait for the disk. Without it the file may be empty or absent after a power cut.

    Raises:
        UnsupportedError: A tensor cannot be read, or the format has no such dtype or key.
        MismatchError: Tensors share bytes and `shared` does not settle it.
        UsageError: `dtype` is no float dtype, `out` is a file that the checkpoint is read from, its extension stands
            for no format, the format has no shards, or a file of another layout is in the way.
        FormatError: The file is damaged, or changed while it was read; `out` is as it was.
        IoError: Reading or writing failed; `out` is as it was.
    """
    opened = _opened(checkpoint, top_level_key, keys)
    if dtype is not None:
        opened = opened.cast(dtype)
    text = _core.convert(
        opened._core,  # noqa: SLF001  (one package)
        out,
        target=format,
        shared=shared,
        max_shard=None if max_shard_size is None else str(max_shard_size),
        sync=sync,
    )
    data = json.loads(text)
    return ConvertReport(
        out=Path(data["out"]),
        files=tuple(map(Path, data["files"])),
        tensors=data["tensors"],
        nbytes=data["nbytes"],
        dropped_aliases=data["dropped_aliases"],
        not_carried=tuple(data["not_carried"]),
        notices=tuple(data["notices"]),
    )


def extract(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keys: KeyMap | None = None,
    dtype: str | None = None,
    format: Literal["safetensors", "pt", "npz"] | None = None,  # noqa: A002  (what it is called everywhere)
    shared: Literal["error", "duplicate", "drop-aliases"] = "error",
    max_shard_size: int | str | None = None,
    sync: bool = True,
) -> ConvertReport:
    """Read the weights back out of an artifact, under the names of its slots. Runs nothing of it.

    Tied weights stay tied in a `.pt`; for the other formats `shared` says what to do. Slots without bytes in the file
    are not there. Reads all weight bytes and compares their CRCs.

    Args:
        artifact: A compiled `.pt2` package, an exported program, a TorchScript archive, or a library beside its
            `.wrapper.cpp`.
        out: The file to write.
        keys: Which names, and under which other ones.
        dtype: As for `convert`.
        format: As for `convert`.
        shared: As for `convert`.
        max_shard_size: As for `convert`.
        sync: As for `convert`.

    Raises:
        MismatchError: Tensors share bytes and `shared` does not settle it.
        UnsupportedError: The file is no artifact, or the format has no such dtype or key.
        UsageError: As for `convert`.
        FormatError: The file is damaged.
        IoError: Reading or writing failed; `out` is as it was.
    """
    weights = Checkpoint(_core.Checkpoint.of_artifact(artifact))
    return convert(
        weights, out, keys=keys, dtype=dtype, format=format, shared=shared, max_shard_size=max_shard_size, sync=sync
    )
