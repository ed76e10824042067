"""A worker on a laptop that saves once: `child_worker.py URI ENDPOINT`. Says where and by whom, then what became of it."""

from __future__ import annotations

import json
import sys
import time

from trainyard.checkpoint.client import ChildUploads, open_uploads
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.messages import Staged
from trainyard.checkpoint.staging import StagingFolder
from trainyard.checkpoint.stores import open_store
from trainyard_api.checkpoints import Record, shard_key

SIZE = 100_000


def main() -> None:
    config = CheckpointConfig(uri=sys.argv[1], run="run-1", endpoint=sys.argv[2])
    staging = StagingFolder()
    uploads = open_uploads(config, open_store(config), staging.path)
    assert isinstance(uploads, ChildUploads)
    path = staging.path / shard_key(10, 1, 0, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * SIZE)
    head = Record(kind="commit", seq=0, run="run-1", attempt=1, step=10, time=time.time(), world_size=1)
    uploads.submit(Staged(attempt=1, step=10, rank=0, world=1, path=str(path), size=SIZE, record=head))
    assert uploads._process is not None
    print(json.dumps({"staging": str(staging.path), "child": uploads._process.pid}), flush=True)
    outcome = uploads.take(60)
    print(json.dumps(outcome and {"op": outcome.op, "reason": outcome.reason}), flush=True)
    if not uploads.close():
        staging.close()
    print("closed", flush=True)


if __name__ == "__main__":
    main()
