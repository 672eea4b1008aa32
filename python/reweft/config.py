"""Configs: what a checkpoint holds beside its tensors, as plain Python data or as a dataclass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from reweft import _core
from reweft._config_values import ConfigDict, ConfigName, ConfigObject
from reweft._into import fit
from reweft.limits import given

if TYPE_CHECKING:
    import os

    from reweft.limits import Limits

__all__ = ["ConfigDict", "ConfigName", "ConfigObject", "load_config"]

T = TypeVar("T")


@overload
def load_config(
    path: str | os.PathLike[str], *, top_level_key: str | None = None, limits: Limits | None = None
) -> Any: ...
@overload
def load_config(
    path: str | os.PathLike[str], *, top_level_key: str | None = None, into: type[T], limits: Limits | None = None
) -> T: ...
def load_config(
    path: str | os.PathLike[str],
    *,
    top_level_key: str | None = None,
    into: type[Any] | None = None,
    limits: Limits | None = None,
) -> Any:
    """Read the part of a checkpoint that is no tensor, without running anything in it.

    The result is what `torch.load` or `pickle.load` gives, of the classes of Python's library and numpy. Objects that
    the file holds once are one object. These have a form of their own: `torch.Size` is a tuple; dtypes, devices and
    other constants of torch, classes and functions are `ConfigName`; instances of other classes are `ConfigObject` or
    `ConfigDict`; containers of omegaconf are the dicts and lists in them, with interpolations unresolved. Texts of
    Python 2 are UTF-8, or an error.

    With `into`, a dataclass or another annotated type, every value must fit its field: fields that are missing and have
    no default, and keys without a field, are errors. An int stands in for a float if they are equal, a list and a tuple
    for each other, a numpy scalar for its number, a `ConfigName` for its text; nothing else is converted. Dicts,
    namespaces and `ConfigObject`s fill nested dataclasses; enums are made from their members.

    Args:
        path: A file that torch or pickle wrote; the format is found by content.
        top_level_key: Dotted path of the config, through dicts, lists and attributes.
        into: The type to make.
        limits: What reading may cost; None for the defaults.

    Raises:
        NotFoundError: The top-level key does not exist; the message lists those that do.
        UnsupportedError: A value is a tensor or of a form that is not known; `.key` is its path.
        MismatchError: A value does not fit `into`; `.key` is its path.
        FormatError: The file is damaged, or a value holds itself.
        KeyCollisionError: A dict has one key twice.
        LimitError: Shared values come to more than a named limit allows.
        IoError: The file cannot be read.

    Example:
        >>> reweft.load_config("weights_with_config.pt", top_level_key="my_config")  # doctest: +SKIP
        {'n_head': 2, 'd_model': 512, 'some_list_str': ['hello', 'world']}
    """
    config = _core.load_config(path, top_level_key=top_level_key, limits=given(limits))
    if into is None:
        return config
    return fit(config, into, path, top_level_key)
