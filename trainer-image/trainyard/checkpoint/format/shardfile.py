"""The file of one rank: a safetensors file (https://huggingface.co/docs/safetensors, "Format") of pieces of tensors.

Eight bytes with the length of the header, the header in JSON, then the tensors' bytes without gaps. `__metadata__` has
"DCP_SHARDING_INFO", so that torch's own `HuggingFaceStorageReader` finds each piece's place in the whole tensor, and
"trainyard": the skeletons (`tree`) and the shapes of the whole tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import ShardInvalid
from trainyard.checkpoint.format.dtypes import from_name, to_name
from trainyard.checkpoint.format.geometry import Box, Index

if TYPE_CHECKING:
    import torch

FORMAT = 3
_LENGTH = struct.Struct("<Q")
_PAGE = 4096
"""Bytes: headers are filled up to it, so that a number that has a digit more does not move all tensors."""
MOST_HEADER = 100 << 20
"""Bytes: what safetensors itself allows."""
_MOST_DIMENSIONS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One piece in a file."""

    name: str
    """Of the whole tensor: several files may have pieces of one, one file has one at most."""
    dtype: str
    """safetensors' name."""
    box: Box
    whole: Index
    begin: int
    end: int
    """Bytes, from the beginning of the file."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Never None: `read_header` has looked."""
        found = from_name(self.dtype)
        if found is None:
            raise ShardInvalid(f"{self.name}: this torch has no {self.dtype}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    entries: dict[str, Entry]
    trees: dict[str, Any]
    """Skeletons: "rank" in each file, "checkpoint" in rank 0's."""
    size: int
    """Bytes of the file."""
    raw: bytes = field(repr=False)
    """The file's beginning, up to the tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A piece that is to be written."""

    name: str
    dtype: torch.dtype
    box: Box
    whole: Index


class Layout:
    """Where pieces lie in a file, and all of its header that does not change from one save to the next.

    None of the pieces is empty, but for tensors that are. Aligned: the widest dtypes come first.
    """

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self.wanted = sorted(wanted, key=lambda w: (-w.dtype.itemsize, w.name))
        self.places: dict[str, tuple[int, int]] = {}
        """By name: [begin, end) in bytes after the header."""
        self.bytes = 0
        """Of all pieces."""
        spans: dict[str, Any] = {}
        for one in self.wanted:
            span = self.bytes, self.bytes + one.box.numel * one.dtype.itemsize
            self.places[one.name], self.bytes = span, span[1]
            spans[one.name] = {
                "dtype": to_name(one.dtype), "shape": list(one.box.shape), "data_offsets": list(span),
            }  # fmt: skip
        info = json.dumps({w.name: {"saved_offsets": list(w.box.offset)} for w in self.wanted})
        whole = _compact({w.name: list(w.whole) for w in self.wanted})
        text = _compact(spans)[1:-1]
        # JSON within JSON: characters are escaped one by one, so that pieces of the text can be escaped by themselves.
        self._before = f'{{"__metadata__":{{"DCP_SHARDING_INFO":{json.dumps(info)},"trainyard":"' + _escaped(
            f'{{"format":{json.dumps(FORMAT)},"trees":'
        )
        self._after = _escaped(f',"whole":{whole}}}') + f'"}}{"," if text else ""}{text}}}'

    def beginning(self, trees: dict[str, Any]) -> bytes:
        """The file up to its first piece."""
        text = (self._before + _escaped(_compact(trees)) + self._after).encode()
        text += b" " * (-(len(text) + _LENGTH.size) % _PAGE)
        return _LENGTH.pack(len(text)) + text


def make_header(wanted: Iterable[Wanted], trees: dict[str, Any]) -> Header:
    """The header of a file that holds these pieces."""
    layout = Layout(wanted)
    raw = layout.beginning(trees)
    entries = {}
    for one in layout.wanted:
        begin, end = layout.places[one.name]
        entries[one.name] = Entry(
            name=one.name, dtype=str(to_name(one.dtype)), box=one.box, whole=one.whole,
            begin=len(raw) + begin, end=len(raw) + end,
        )  # fmt: skip
    return Header(entries=entries, trees=trees, size=len(raw) + layout.bytes, raw=raw)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def header_length(beginning: bytes, size: int) -> int:
    """Bytes that the header takes, from a file of `size` bytes' first eight. Raises ShardInvalid."""
    if len(beginning) < _LENGTH.size:
        raise ShardInvalid("a shard of less than 8 bytes")
    length: int = _LENGTH.unpack_from(beginning)[0]
    if length > min(MOST_HEADER, size - _LENGTH.size):
        raise ShardInvalid(f"a header of {length} bytes in a shard of {size}")
    return _LENGTH.size + length


def read_header(beginning: bytes, size: int) -> Header:
    """Of a file of `size` bytes, from its first `header_length` bytes or more. Raises ShardInvalid for anything that
    `make_header` does not make: every span is inside of the file, has the length of its shape, and overlaps no other.
    """
    start = header_length(beginning, size)
    try:
        text = json.loads(beginning[_LENGTH.size : start], object_pairs_hook=_no_twins)
        own = json.loads(text["__metadata__"]["trainyard"], object_pairs_hook=_no_twins)
        offsets = json.loads(text["__metadata__"]["DCP_SHARDING_INFO"])
        if own["format"] != FORMAT:
            raise ShardInvalid(f"a shard of format {own['format']!r}, this version reads {FORMAT}")
        trees = own["trees"]
        if not isinstance(trees, dict):
            raise ValueError("trees")  # noqa: TRY004 - of a file's content, not of an argument
        entries, at = {}, start
        for name, span in text.items():
            if name == "__metadata__":
                continue
            entry = _entry(name, span, offsets[name]["saved_offsets"], own["whole"][name], start)
            if entry.begin != at:
                raise ValueError(f"{name[:100]} does not begin where the one before ends")
            entries[name], at = entry, entry.end
        if at != size:
            raise ValueError(f"tensors up to byte {at} of {size}")
    except ShardInvalid:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError) as error:
        raise ShardInvalid(
            f"not the header of a shard: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    return Header(entries=entries, trees=trees, size=size, raw=beginning[:start])


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _entry(name: str, span: Any, offset: Any, whole: Any, start: int) -> Entry:
    begin, end = _numbers(span["data_offsets"], 2)
    shape = _numbers(span["shape"])
    at, wide = _numbers(offset, len(shape)), _numbers(whole, len(shape))
    dtype = from_name(str(span["dtype"]))
    if dtype is None:
        raise ShardInvalid(f"{name[:100]}: dtype {str(span['dtype'])[:20]!r} is unknown to this version")
    box = Box(at, shape)
    if any(a + n > w for a, n, w in zip(at, shape, wide, strict=True)):
        raise ValueError(f"{name[:100]} reaches beyond its tensor")
    if end - begin != box.numel * dtype.itemsize:
        raise ValueError(f"{name[:100]} has {end - begin} bytes, its shape {box.numel * dtype.itemsize}")
    return Entry(
        name=name, dtype=str(span["dtype"]), box=box, whole=wide, begin=start + begin, end=start + end
    )


def _numbers(value: Any, count: int | None = None) -> Index:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS or count not in (None, len(value)):
        raise ValueError("not a list of numbers")
    if any(type(n) is not int or n < 0 for n in value):
        raise ValueError("not a list of numbers")
    return tuple(value)
