"""What is in a commit, without reading a tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from trainyard.checkpoint.format.tree import Ref
from trainyard.checkpoint.reader import CheckpointReader
from trainyard.checkpoint.sources import StoreSource
from trainyard.checkpoint.tools.places import Run
from trainyard.checkpoint.tools.skeletons import with_refs
from trainyard_api.checkpoints import Record

_LONGEST = 200
"""Characters of a value that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One whole tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: int
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    record: Record
    tensors: list[Tensor]
    """By name, numbers in it by their value."""
    values: dict[str, str]
    """Dotted path to the text of each value that is not a tensor, in the order of the checkpoint."""


def describe(run: Run, record: Record) -> Content:
    """Reads the headers only. Raises ShardInvalid, StoreError."""
    reader = CheckpointReader(record, [StoreSource(run.store)])
    headers = reader.headers()
    found: dict[str, list[Any]] = {}
    for header in headers:
        for entry in header.entries.values():
            found.setdefault(entry.name, []).append(entry)
    tensors = [
        Tensor(
            name=name, dtype=str(pieces[0].torch_dtype).removeprefix("torch."), shape=pieces[0].whole,
            pieces=len(pieces), size=sum(p.end - p.begin for p in pieces),
        )
        for name, pieces in sorted(found.items(), key=lambda item: _natural(item[0]))
    ]  # fmt: skip
    values: dict[str, str] = {}
    _values(with_refs(reader.tree("checkpoint")), "", values)
    return Content(record=record, tensors=tensors, values=values)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: numbers by their value."""
    parts = re.split(r"(\d+)", name)
    return [(int(part[:18]), part) if part.isdecimal() else (-1, part) for part in parts]


def _values(node: Any, path: str, found: dict[str, str]) -> None:
    if isinstance(node, Ref):
        return
    if isinstance(node, dict) and node:
        for key, value in node.items():
            _values(value, f"{path}.{key}" if path else str(key), found)
    elif isinstance(node, list | tuple) and any(isinstance(v, Ref | dict | list | tuple) for v in node):
        for index, value in enumerate(node):
            _values(value, f"{path}.{index}", found)
    else:
        text = repr(node)
        found[path] = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
