"""Checksums of a shard: SHA-256 of each part, and one over those.

The parts are those in which a shard goes to S3: so a digest is computed once, the server checks it on each UploadPart,
a reader checks it on each ranged GET, and `tree_hash` is what S3 itself keeps as the object's composite checksum
(`ChecksumSHA256`, https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.checkpoint.errors import ShardInvalid
from trainyard_api.checkpoints import MOST_SHARD, Shard
from trainyard_api.serde import decode, encode

PART = 16 << 20
"""Bytes. At least S3's least part (5 MiB)."""
_MOST_PARTS = 9000
"""S3 takes 10 000."""


def part_size(size: int) -> int:
    """Bytes of each part but the last of a shard of `size` bytes."""
    part = PART
    while part * _MOST_PARTS < size:
        part *= 2
    return part


def spans(size: int, part: int) -> list[tuple[int, int]]:
    """[begin, end) of each part, in order. A shard has at least its header, so never none."""
    return [(begin, min(begin + part, size)) for begin in range(0, size, part)]


def digest(data: Any) -> str:
    """Lower-case hex. Releases the GIL."""
    return hashlib.sha256(data).hexdigest()


def tree_hash(parts: Sequence[str]) -> str:
    """SHA-256 over the raw digests of the parts."""
    return hashlib.sha256(b"".join(bytes.fromhex(part) for part in parts)).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """Beside each shard, under `descriptor_key`: what its uploader found it to be."""

    shard: Shard
    parts: list[str]
    """SHA-256 of each part."""

    def to_json(self) -> dict[str, Any]:
        return encode(self)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Any, expected: Shard | None = None) -> Descriptor:
        """Raises ShardInvalid for what cannot be, or is not the descriptor of the shard `expected`."""
        try:
            found = decode(cls, data)
            if not 1 <= found.shard.size <= MOST_SHARD or found.shard.part_size != part_size(
                found.shard.size
            ):
                raise ValueError(f"size {found.shard.size} in parts of {found.shard.part_size}")
            # Counted, not listed: a size that lies must not decide how much is allocated.
            count = -(-found.shard.size // found.shard.part_size)
            if len(found.parts) != count or tree_hash(found.parts) != found.shard.sha256:
                raise ValueError("its parts do not add up to its checksum")
        except ValueError as error:
            raise ShardInvalid(f"descriptor of {expected.key if expected else 'a shard'}: {error}") from error
        if expected is not None and found.shard != expected:
            raise ShardInvalid(f"{expected.key}: its descriptor is not the one that was committed")
        return found
