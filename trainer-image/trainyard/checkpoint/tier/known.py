"""`log.json`: the records that rank 0's node knew last, so that a restart in place need not ask the bucket for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from trainyard.checkpoint.tier.keeper import write_whole
from trainyard_api.checkpoints import Record

_NAME = "log.json"
_MOST = 64 << 20


def write_known(root: Path, uri: str, run: str, records: Iterable[Record]) -> None:
    """Raises OSError."""
    data = {"uri": uri, "run": run, "records": [record.to_json() for record in records]}
    write_whole(root / _NAME, json.dumps(data).encode())


def read_known(root: Path, uri: str, run: str, attempt: int | None) -> list[Record] | None:
    """The records, if it is sure that nobody has written since but the attempt that begins, number `attempt`.

    It is if the newest record is of the attempt right before: rank 0 of that one ran here, and nobody else may write in
    its name. With an older file, records might be missing whose numbers are free again, and a fence that is written
    below the newest commit fences nobody.
    """
    path = root / _NAME
    try:
        if path.stat().st_size > _MOST:
            return None
        data = json.loads(path.read_bytes())
        if (data["uri"], data["run"]) != (uri, run):
            return None
        records = [Record.from_json(one, run=run, seq=one["seq"]) for one in data["records"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    newest = max((record.attempt for record in records), default=None)
    return records if attempt is not None and newest == attempt - 1 else None
