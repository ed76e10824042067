"""Hyperparameters as a checkpoint holds them: tensors and primitives, which anybody can load without running code."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence, Set
from enum import Enum, StrEnum
from pathlib import PurePath
from typing import Any, NamedTuple

OWN = "trainyard"
"""The one key of ours in a checkpoint, beside Lightning's."""

_PRIMITIVES = (bool, int, float, complex, str, bytes, type(None))


class Kind(StrEnum):
    """What was done to a value, for who loads it."""

    SAME = "same"
    """Nothing that matters: it can be given to `__init__` as it is."""
    TYPED = "typed"
    """It was an enumeration's member, a dataclass, an array: the annotation of `__init__` says what to make of it."""
    TEXT = "text"
    """It is lost; this is its text."""


class Portable(NamedTuple):
    value: Any
    kind: Kind


def to_portable(value: Any) -> Portable:
    """A copy of `value` of nothing but tensors and primitives."""
    import torch

    if type(value) in _PRIMITIVES:
        return Portable(value, Kind.SAME)
    if isinstance(value, torch.Tensor):
        return Portable(value.detach(), Kind.SAME)
    if isinstance(value, torch.Size | torch.device | torch.dtype):
        return Portable(value, Kind.SAME)
    if isinstance(value, Enum):
        return Portable(to_portable(value.value).value, Kind.TYPED)
    if isinstance(value, PurePath):
        return Portable(str(value), Kind.SAME)
    if type(value).__module__ == "numpy" and hasattr(value, "ndim"):
        if value.ndim == 0:
            return Portable(value.item(), Kind.SAME)
        return Portable(torch.from_numpy(value.copy()), Kind.TYPED)
    if isinstance(value, _PRIMITIVES):  # subclasses of them
        base: Any = next(kind for kind in _PRIMITIVES if isinstance(value, kind))
        return Portable(base(value), Kind.SAME)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return _worse(_mapping(fields), Kind.TYPED)
    if isinstance(value, Namespace):
        return _worse(_mapping(vars(value)), Kind.TYPED)
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, Sequence | Set):
        parts = [to_portable(part) for part in value]
        kind = _worst([part.kind for part in parts])
        made: Any = type(value) if type(value) in (tuple, set) else list
        return Portable(made(part.value for part in parts), kind)
    return Portable(text_of(value), Kind.TEXT)


def text_of(value: Any) -> str:
    """Of what cannot be kept: the import path of a class or function, else its repr."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _mapping(value: Mapping[Any, Any]) -> Portable:
    parts = {key if type(key) in _PRIMITIVES else str(key): to_portable(part) for key, part in value.items()}
    kind = _worst([part.kind for part in parts.values()])
    return Portable({key: part.value for key, part in parts.items()}, kind)


def _worst(kinds: list[Kind]) -> Kind:
    return max(kinds, key=list(Kind).index, default=Kind.SAME)


def _worse(found: Portable, kind: Kind) -> Portable:
    return Portable(found.value, _worst([found.kind, kind]))
