"""Upload and download of one checkpoint, ours and boto3's in turns: the same bytes, to and from the same server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import checkpoint_states as states
from tests.bench.checkpoint_savers import BUCKET, bare_client

ALIKE, DEFAULTS = "boto3, parts and threads as ours", "boto3, defaults"
OURS = "trainyard"


def transfer(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each round, by direction and by who does it. A download ends in memory: ours in tensors, each byte
    verified; boto3's in a file on tmpfs, where there is one."""
    import torch

    from tests.bench.checkpoint_cases import places, settle
    from trainyard.checkpoint.config import CheckpointConfig
    from trainyard.checkpoint.format.digest import part_size
    from trainyard.checkpoint.payload import Payload
    from trainyard.checkpoint.saving import save_shard
    from trainyard.checkpoint.staging import StagingFolder
    from trainyard.checkpoint.store_s3 import WORKERS
    from trainyard.checkpoint.stores import open_store

    torch.set_num_threads(1)
    where = places(settings)
    state = states.make(settings["bytes"])
    payload = Payload(checkpoint=state.in_lightnings_layout(), own={})
    staging = StagingFolder(target=where.folder)
    staged = save_shard(payload, staging, step=1, attempt=1, rank=0, world=1)
    last = state.tensors[-1].clone()
    del state, payload
    ours = Ours(open_store(CheckpointConfig(uri=where.uri, run="bench")), staged.path, staged.size)
    bare = {
        name: Bare(f"{where.prefix}/bare", staged.path, where.memory / f"{os.getpid()}", part)
        for name, part in ((ALIKE, part_size(staged.size)), (DEFAULTS, 0))
    }
    found: dict[str, dict[str, list[float]]] = {"upload": {}, "download": {}}
    for number in range(-1, settings["rounds"]):  # one to make connections and code warm
        for direction, all_seconds in found.items():
            ways: dict[str, Callable[[], Any]] = {
                name: getattr(way, direction) for name, way in {OURS: ours, **bare}.items()
            }
            names = list(ways)
            for name in names[number % 3 :] + names[: number % 3]:
                settle()
                begin = time.perf_counter()
                ways[name]()
                seconds = time.perf_counter() - begin
                if number >= 0:
                    all_seconds.setdefault(name, []).append(seconds)
                elif name == OURS and direction == "download":
                    ours.check(last)
                ours.forget()
        for way in bare.values():
            way.clean()
    staging.close()
    return {"bytes": staged.size, "part": part_size(staged.size), "workers": WORKERS, "seconds": found}


class Ours:
    """What an uploader does for a shard: parts, descriptor, commit. What a resume does: everything into tensors."""

    def __init__(self, store: Any, path: Path, size: int) -> None:
        from trainyard.checkpoint.commitlog import CommitLog

        self._store, self._path, self._size = store, path, size
        self._log = CommitLog(store, "bench")
        self._step = 0
        self._record: Any = None
        self._state: Any = None

    def upload(self) -> None:
        from trainyard.checkpoint.format.digest import Descriptor, part_size, tree_hash
        from trainyard_api.checkpoints import Record, Shard, descriptor_key, shard_key

        self._step += 1
        names, part = (self._step, 1, 0, 1), part_size(self._size)
        parts = self._store.put_parts(shard_key(*names), self._path, part)
        shard = Shard(key=shard_key(*names), rank=0, size=self._size, sha256=tree_hash(parts), part_size=part)
        text = json.dumps(Descriptor(shard=shard, parts=parts).to_json()).encode()
        self._store.put(descriptor_key(*names), text)
        self._record = self._log.append(
            Record(
                kind="commit", seq=0, run="bench", attempt=1, step=self._step, time=time.time(), world_size=1, shards=[shard],
            )
        )  # fmt: skip

    def download(self) -> None:
        from trainyard.checkpoint.loading import load_state
        from trainyard.checkpoint.reader import CheckpointReader
        from trainyard.checkpoint.sources import StoreSource

        self._state = load_state(CheckpointReader(self._record, [StoreSource(self._store)]), 0)

    def check(self, last: Any) -> None:
        """That it was really read."""
        import torch

        states = self._state.main["optimizer_states"][0]["state"]
        if not torch.equal(list(states[max(states)].values())[-1], last):
            raise RuntimeError("what was loaded is not what was saved")

    def forget(self) -> None:
        """Of several uploads only the newest is kept, for the disk's sake."""
        from trainyard_api.checkpoints import shard_key

        self._state = None
        if self._step > 1:
            self._store.delete([shard_key(self._step - 1, 1, 0, 1)])


class Bare:
    """boto3's own transfer. Downloads what it has uploaded."""

    def __init__(self, key: str, path: Path, target: Path, part: int) -> None:
        from boto3.s3.transfer import TransferConfig

        from trainyard.checkpoint.store_s3 import WORKERS

        self._key, self._path, self._target = f"{key}-{part}", path, target.with_suffix(f".{part}")
        if part:
            self._config = TransferConfig(
                multipart_threshold=part, multipart_chunksize=part, max_concurrency=WORKERS
            )
            self._s3 = bare_client(max_pool_connections=2 * WORKERS)
        else:
            self._config, self._s3 = TransferConfig(), bare_client()

    def upload(self) -> None:
        self._s3.upload_file(str(self._path), BUCKET, self._key, Config=self._config)

    def download(self) -> None:
        self._s3.download_file(BUCKET, self._key, str(self._target), Config=self._config)

    def clean(self) -> None:
        self._target.unlink(missing_ok=True)
        self._s3.delete_object(Bucket=BUCKET, Key=self._key)
