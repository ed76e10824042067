"""`torch.distributed.checkpoint` on our buckets and directories, without the Trainer:

    from torch.distributed import checkpoint as dcp
    dcp.save(state, checkpoint_id="120", storage_writer=RunStorageWriter("s3://bucket/prefix", "my-run"))
    dcp.load(state, storage_reader=RunStorageReader("s3://bucket/prefix", "my-run"))

The checkpoint id is the step. Format, commit record and fence are those of a TrainingRun, so `trainyard checkpoints` and a
stock HuggingFaceStorageReader read what is written here, and the reader here what a Trainer has saved. Nothing is pickled,
on the way there or back: what is neither tensor nor primitive is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainyard.checkpoint import dcp_state
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.config import CheckpointConfig, KeepBest
from trainyard.checkpoint.dcp_items import box_of, finisher, give, pieces_of, values_of
from trainyard.checkpoint.errors import CheckpointConfigError, CheckpointError, NoUsableCheckpoint
from trainyard.checkpoint.format.digest import Descriptor, part_size, tree_hash
from trainyard.checkpoint.plan import Assigned
from trainyard.checkpoint.reader import CheckpointReader, Request
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.sources import StoreSource
from trainyard.checkpoint.staging import FREE, StagedFile, StagingFolder, stage
from trainyard.checkpoint.stores import Store, open_store
from trainyard_api.checkpoints import (
    Fenced,
    Record,
    Shard,
    check_fence,
    commits_newest_first,
    descriptor_key,
    shard_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("trainyard.checkpoint")

PATIENCE_SECONDS = 120.0
"""How long a store may be unreachable in a save."""
READ_PATIENCE_SECONDS = 10.0
_MOST_STEP = 10**12
_COPIES = 256 << 20
"""Bytes of copies that are made at a time, for targets that cannot be read into."""


class RunStorageWriter(StorageWriter):
    """Saves are committed to the log of `run` under `uri` (`s3://bucket/prefix` or `file:///path`).

    The first save of a writer opens an attempt: from then on a writer of an older one raises Fenced (inside of DCP's
    CheckpointException). `attempt` None takes one more than the newest. `keep` and `keep_best` delete older commits after
    each save; None keeps all. Not for planners with `enable_plan_caching`, nor `use_collectives=False`.
    """

    def __init__(
        self, uri: str, run: str, *, endpoint: str | None = None, region: str | None = None,
        attempt: int | None = None, keep: int | None = None, keep_best: KeepBest | None = None,
    ) -> None:  # fmt: skip
        """Raises ValueError."""
        self._config = CheckpointConfig(
            uri=uri, run=run, endpoint=endpoint, region=region, keep=3 if keep is None else keep, keep_best=keep_best,
        )  # fmt: skip
        self._attempt = attempt
        self._prunes = keep is not None
        self._step: int | None = None
        self._store: Store | None = None
        self._log: CommitLog | None = None
        self._head: Record | None = None
        self._staging: StagingFolder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For `async_checkpointer_type=PROCESS`, which sends the writer to another process: what is open stays here."""
        return self.__dict__ | {"_store": None, "_log": None, "_head": None, "_staging": None}

    def close(self) -> None:
        """Delete the staging folder. The next save makes another."""
        if self._staging is not None:
            self._staging.close()
            self._staging = None

    # ---- DCP's calls, in their order; the global ones on the coordinator only

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._step = None if checkpoint_id is None else _step_of(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_collectives") is False:
            raise CheckpointConfigError(
                "use_collectives=False: a commit needs all ranks, so they have to meet"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # DCP spreads what all ranks have; the others need to know what rank 0 will write anyhow.
        own = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        return dataclasses.replace(plan, storage_data=own)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        head = self._head = with_retries(self._open_attempt, seconds=PATIENCE_SECONDS)
        names = {
            "step": head.step,
            "attempt": head.attempt,
            "world": len(plans),
            "first": plans[0].storage_data,
        }
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        paths: dict[str, dcp_state.Path] = {}
        for plan in reversed(plans):  # the first rank counts where they differ
            paths |= plan.planner_data if isinstance(plan.planner_data, dict) else {}
        for plan in plans:
            for item in plan.items:
                if item.tensor_data is not None:
                    tensors[item.index.fqn] = item.tensor_data.properties.dtype, tuple(item.tensor_data.size)
        return [
            dataclasses.replace(
                plan,
                storage_data={**names, "rank": rank, "paths": paths, "tensors": tensors if rank == 0 else {}},
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if getattr(planner, "_enable_plan_caching", False):
            raise CheckpointConfigError(
                "enable_plan_caching: a cached plan would write over the save that it was made for"
            )
        given = plan.storage_data
        names = {key: int(given[key]) for key in ("step", "attempt", "rank", "world")}
        pieces = pieces_of(plan, planner)
        own = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        own = [name for name in own if name not in given["first"]]
        trees: dict[str, Any] = {"rank": dcp_state.own_values(values_of(planner, own), given["paths"])}
        if names["rank"] == 0:
            leaves = {name: dcp_state.tensor_leaf(name, *about) for name, about in given["tensors"].items()}
            values = values_of(planner, given["first"])
            leaves |= {name: dcp_state.value_leaf(name, value) for name, value in values.items()}
            trees |= {"checkpoint": dcp_state.nested(leaves, given["paths"]), dcp_state.MARK: 1}
        shard = self._upload(pieces, trees, **names)
        results = [WriteResult(index=item.index, size_in_bytes=0, storage_data=shard) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            results or [WriteResult(index=MetadataIndex(""), size_in_bytes=0, storage_data=shard)]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        commits, head = self._log, self._head
        if commits is None or head is None:
            raise RuntimeError("prepare_global_plan() comes first")
        shards: list[Shard] = [each[0].storage_data for each in results]
        record = dataclasses.replace(head, world_size=len(shards), shards=shards, time=time.time())
        appended = with_retries(lambda: commits.append(record), seconds=PATIENCE_SECONDS)
        log.info("checkpoint of step %d committed: %s", record.step, commits.uri(appended.seq))
        self._head = self._step = None
        if self._prunes:
            try:
                commits.prune(
                    keep=self._config.keep, keep_best=self._config.keep_best, attempt=record.attempt
                )
            except (CheckpointError, Fenced) as error:
                log.warning("older checkpoints were not deleted: %s", error)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.fspath(checkpoint_id).isdecimal()

    def storage_meta(self) -> StorageMeta | None:
        return None

    # ---- ours

    def _open(self) -> Store:
        if self._store is None:
            self._store = open_store(self._config)
        return self._store

    def _open_attempt(self) -> Record:
        """The head of the commit record. Writes the fence of this writer's attempt, once."""
        run = self._config.run_id
        commits = self._log
        if commits is None:
            commits = self._log = CommitLog(self._open(), run)
        while True:
            records = commits.refresh()
            newest = commits_newest_first(records)[:1]
            attempt = self._attempt or 1 + max((r.attempt for r in records), default=0)
            check_fence(records, attempt)
            if any(r.kind == "fence" and r.attempt == attempt for r in records):
                break
            fence = Record(
                kind="fence", seq=0, run=run, attempt=attempt, step=newest[0].step if newest else 0, time=time.time(),
                parent=newest[0].seq if newest else 0, reason="resume=dcp",
            )  # fmt: skip
            if commits.try_append(fence) is not None:
                break
        self._attempt = attempt
        step = self._step
        if step is None:
            step = newest[0].step + 1 if newest else 0
        if any(r.kind == "commit" and (r.step, r.attempt) == (step, attempt) for r in records):
            raise CheckpointConfigError(
                f"step {step} is saved already, by this attempt; a checkpoint is never replaced"
            )
        return Record(
            kind="commit", seq=0, run=run, attempt=attempt, step=step, time=0.0, reason="dcp",
            versions={"torch": str(torch.__version__)},
        )  # fmt: skip

    def _upload(
        self, pieces: list[Assigned], trees: dict[str, Any], *, step: int, attempt: int, rank: int, world: int
    ) -> Shard:
        store = self._open()
        if self._staging is None:
            local = self._config.uri.startswith("file://")
            self._staging = StagingFolder(
                target=Path(unquote(urlsplit(self._config.uri).path)) if local else None
            )
        staged = stage(pieces, trees, self._staging, step=step, attempt=attempt, rank=rank, world=world)
        try:
            key, part = shard_key(step, attempt, rank, world), part_size(staged.size)
            digests = with_retries(lambda: store.put_parts(key, staged.path, part), seconds=PATIENCE_SECONDS)
            shard = Shard(key=key, rank=rank, size=staged.size, sha256=tree_hash(digests), part_size=part)
            data = json.dumps(Descriptor(shard=shard, parts=digests).to_json()).encode()
            name = descriptor_key(step, attempt, rank, world)
            with_retries(lambda: store.put(name, data), seconds=PATIENCE_SECONDS)
        finally:
            self._retire(staged)
        return shard

    def _retire(self, staged: StagedFile) -> None:
        """Its pages are warm: the next save takes it."""
        if self._staging is not None:
            free = self._staging.path / FREE
            with contextlib.suppress(OSError):  # a directory store may have taken it
                free.mkdir(exist_ok=True)
                staged.path.replace(free / f"{uuid.uuid4().hex}.safetensors")


class RunStorageReader(StorageReader):
    """Reads a commit of `run` under `uri`: that of the step which is the checkpoint id, else the newest.

    Each rank reads the parts that it needs, several at a time, each checked against the commit. Damage raises ShardInvalid
    (inside of DCP's CheckpointException) and loads nothing else instead.
    """

    def __init__(self, uri: str, run: str, *, endpoint: str | None = None, region: str | None = None) -> None:
        """Raises ValueError."""
        self._config = CheckpointConfig(uri=uri, run=run, endpoint=endpoint, region=region)
        self._step: int | None = None
        self._reader: CheckpointReader | None = None
        self._contents: dcp_state.Contents | None = None

    @property
    def record(self) -> Record:
        """Of the commit that was read."""
        return self._opened()[0].record

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._step = None if checkpoint_id is None else _step_of(checkpoint_id)

    def read_metadata(self) -> Metadata:
        store, run = open_store(self._config), self._config.run_id
        commits = CommitLog(store, run)
        records = commits_newest_first(with_retries(commits.refresh, seconds=READ_PATIENCE_SECONDS))
        found = [r for r in records if self._step is None or r.step == self._step]
        if not found:
            which = "no checkpoint" if self._step is None else f"no checkpoint of step {self._step}"
            raise NoUsableCheckpoint("; ".join([f"{store.uri}: {which}", *commits.unreadable.values()]))
        reader = self._reader = CheckpointReader(found[0], [StoreSource(store)])
        contents = self._contents = dcp_state.contents(reader)
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for header in reader.headers():
            for entry in header.entries.values():
                chunk = ChunkStorageMetadata(torch.Size(entry.box.offset), torch.Size(entry.box.shape))
                chunks.setdefault(entry.name, []).append(chunk)
        described: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=ref.dtype), size=torch.Size(ref.shape), chunks=chunks.get(ref.name, []),
            )
            for name, ref in contents.tensors.items()
        }  # fmt: skip
        described |= {name: BytesStorageMetadata() for name in contents.values}
        return Metadata(state_dict_metadata=described, planner_data=contents.paths)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return dataclasses.replace(plan, storage_data=self.record.seq)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        if len({plan.storage_data for plan in plans}) > 1:
            raise CheckpointError(
                "a checkpoint was committed while this one was looked for; load again, or name its step"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reader, contents = self._opened()
        finish: list[Callable[[], None]] = []
        requests: list[Request] = []
        copied = 0

        def flush() -> None:
            nonlocal copied
            reader.load(requests)
            for each in finish:
                each()
            requests.clear()
            finish.clear()
            copied = 0

        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                give(planner, item, contents.values[name])
                continue
            ref = contents.tensors[name]
            target = planner.resolve_tensor(item).detach()
            box = box_of(item)
            if tuple(target.shape) != box.shape:
                raise CheckpointError(f"{name}: {list(target.shape)} is to be filled with {list(box.shape)}")
            direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == ref.dtype
            source = target if direct else torch.empty(box.shape, dtype=ref.dtype)
            if box.numel:
                requests.append(Request(ref.name, box, ref.shape, source))
            copied += 0 if direct else box.numel * ref.dtype.itemsize
            finish.append(finisher(planner, item, target, source))
            if copied >= _COPIES:
                flush()
        flush()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return os.fspath(checkpoint_id).isdecimal()

    def _opened(self) -> tuple[CheckpointReader, dcp_state.Contents]:
        if self._reader is None or self._contents is None:
            raise RuntimeError("read_metadata() comes first")
        return self._reader, self._contents


def _step_of(checkpoint_id: str | os.PathLike[str]) -> int:
    """Raises CheckpointConfigError."""
    text = str(checkpoint_id)
    if not text.isdecimal() or int(text) >= _MOST_STEP:
        raise CheckpointConfigError(
            f"checkpoint_id {text!r}: the id of a checkpoint is its step, a whole number"
        )
    return int(text)
