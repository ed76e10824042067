"""A commit as a file for others: Lightning's `.ckpt`, safetensors, a consolidated state dict, or a folder for DCP.

Tensors are assembled in mapped files beside the output, not in memory: what is read is written back by the kernel as it
sees fit. So memory is `WORKERS` parts and no multiple of the model. All that is read is verified.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointConfigError, ShardInvalid
from trainyard.checkpoint.format.digest import digest, spans
from trainyard.checkpoint.format.dtypes import to_name
from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.format.tree import Ref, refs, unflatten
from trainyard.checkpoint.reader import WORKERS, CheckpointReader, Request
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.sources import StoreSource
from trainyard.checkpoint.tools.places import PATIENCE_SECONDS, Run
from trainyard.checkpoint.tools.progress import Progress, Quiet
from trainyard.checkpoint.tools.skeletons import weights, with_refs
from trainyard_api.checkpoints import Record, Shard

if TYPE_CHECKING:
    import torch

_GROUP = 256 << 20
"""Bytes that are asked of the reader at a time: it reads many parts at once, and progress is told in between."""
_OWN = "trainyard"


def export(run: Run, record: Record, to: str, output: Path, *, progress: Progress | None = None) -> list[str]:
    """Write `output`, whole or not at all; what was there is replaced, but for a folder. Returns what was left out, a
    sentence each.

    Raises CheckpointConfigError, ShardInvalid, StoreError, OSError.
    """
    writer = EXPORTS.get(to)
    if writer is None:
        raise CheckpointConfigError(f"{to!r} is no format; there are {', '.join(EXPORTS)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    return writer(run, record, output, progress or Quiet())


def _ckpt(run: Run, record: Record, output: Path, progress: Progress) -> list[str]:
    from trainyard.trainer import ckpt_file

    reader = _reader(run, record)
    trees = {"main": reader.tree("checkpoint")}
    trees |= {str(rank): reader.tree("rank", rank) for rank in range(record.world_size)}
    with _assembled(reader, trees, output.parent, progress) as state:
        main = state["main"]
        if not isinstance(main, dict):
            raise ShardInvalid(f"step {record.step}: the checkpoint is no dict")
        if isinstance(
            main.get(_OWN), dict
        ):  # the Trainer's: a run that goes on from the file does so exactly
            main[_OWN]["ranks"] = [state[str(rank)] for rank in range(record.world_size)]
        ckpt_file.write(main, output)
    if "state_dict" not in main:
        return ["the checkpoint has no 'state_dict': it is not Lightning's, and neither is the file"]
    return []


def _state_dict(run: Run, record: Record, output: Path, progress: Progress) -> list[str]:
    from trainyard.trainer import ckpt_file

    reader = _reader(run, record)
    tree = reader.tree("checkpoint")
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    with _assembled(reader, {"main": tree}, output.parent, progress) as state:
        if not isinstance(state["main"], dict):
            raise ShardInvalid(f"step {record.step}: the checkpoint is no dict")
        ckpt_file.write(state["main"], output)
    return []


def _safetensors(run: Run, record: Record, output: Path, progress: Progress) -> list[str]:
    reader = _reader(run, record)
    tree = reader.tree("checkpoint")
    found = weights(with_refs(tree))
    _refuse_more_than_there_is(record, found)
    about = {"format": "pt", "trainyard.step": str(record.step), "trainyard.run": record.run}
    header, places = _layout(found, about)
    size = max((end for _, end in places.values()), default=0) + len(header)
    with _temporary(output) as path:
        _allocate(path, size)
        with path.open("r+b") as file:
            file.write(header)
        if size > len(header):
            import torch

            # torch's mapping begins at byte 0; views of it are the tensors.
            memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            targets = {}
            for name, ref in found.items():
                begin, end = (len(header) + at for at in places[name])
                if end > begin:
                    targets[name] = memory[begin:end].view(ref.dtype).view(ref.shape)
            _load(reader, [(ref, targets[name]) for name, ref in found.items() if name in targets], progress)
            del memory, targets
        path.replace(output)
    dense = {ref.name for ref in found.values()}
    inner = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    left = [ref.name for ref in refs(inner) if ref.name not in dense]
    return [f"left out, being no dense tensors: {', '.join(left[:5])}"] if left else []


def _dcp(run: Run, record: Record, output: Path, progress: Progress) -> list[str]:
    """The shards as they are: torch.distributed.checkpoint.HuggingFaceStorageReader(output) loads them."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointConfigError(f"{output} exists, and is no empty folder; name a new one")
    reader = _reader(run, record)
    reader.headers()
    source = StoreSource(run.store)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    progress.begin(f"step {record.step}", sum(s.size for s in record.shards))
    try:
        for shard in record.shards:
            _copy_shard(source, shard, folder / Path(shard.key).name, progress)
        folder.chmod(0o755)
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        progress.end()
    return []


def _copy_shard(source: StoreSource, shard: Shard, path: Path, progress: Progress) -> None:
    """Raises ShardInvalid, StoreError, OSError."""
    described = with_retries(lambda: source.descriptor(shard), seconds=PATIENCE_SECONDS)
    _allocate(path, shard.size)
    with path.open("r+b") as file, ThreadPoolExecutor(WORKERS) as pool:

        def copy(item: tuple[int, tuple[int, int]]) -> None:
            number, (begin, end) = item
            buffer = bytearray(end - begin)
            with_retries(lambda: source.read_into(shard, begin, memoryview(buffer)), seconds=PATIENCE_SECONDS)
            if digest(buffer) != described.parts[number]:
                raise ShardInvalid(f"{shard.key}: part {number} does not have the SHA-256 of its commit")
            _write_at(file.fileno(), buffer, begin)
            progress.advance(len(buffer))

        list(pool.map(copy, enumerate(spans(shard.size, shard.part_size))))


EXPORTS: Mapping[str, Callable[[Run, Record, Path, Progress], list[str]]] = {
    "ckpt": _ckpt, "safetensors": _safetensors, "state-dict": _state_dict, "dcp": _dcp,
}  # fmt: skip


def _reader(run: Run, record: Record) -> CheckpointReader:
    return CheckpointReader(record, [StoreSource(run.store)])


@contextlib.contextmanager
def _assembled(
    reader: CheckpointReader, trees: Mapping[str, Any], folder: Path, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The states of `trees`; their tensors are in a mapped file that is deleted already."""
    import numpy as np
    import torch

    wanted = {ref.name: ref for tree in trees.values() for ref in refs(tree)}
    _refuse_more_than_there_is(reader.record, wanted)
    tensors: dict[str, torch.Tensor] = {}
    with tempfile.NamedTemporaryFile(prefix=".trainyard-", dir=folder) as scratch:
        at = 0
        _allocate(Path(scratch.name), sum(-(-ref.nbytes // 64) * 64 for ref in wanted.values()))
        for ref in wanted.values():
            if ref.nbytes:
                # A mapping each: torch.save writes the whole memory that a tensor is part of.
                mapped = np.memmap(scratch.name, np.uint8, "r+", at, ref.nbytes)
                tensors[ref.name] = torch.from_numpy(mapped).view(ref.dtype).view(ref.shape)
                at += -(-ref.nbytes // 64) * 64
            else:
                tensors[ref.name] = torch.empty(ref.shape, dtype=ref.dtype)
        _load(reader, [(ref, tensors[ref.name]) for ref in wanted.values() if ref.nbytes], progress)
        yield {key: unflatten(tree, lambda ref: tensors[ref.name]) for key, tree in trees.items()}


def _load(reader: CheckpointReader, wanted: list[tuple[Ref, torch.Tensor]], progress: Progress) -> None:
    progress.begin(f"step {reader.record.step}", sum(ref.nbytes for ref, _ in wanted))
    try:
        group: list[Request] = []
        size = 0
        for ref, target in wanted:
            group.append(Request(ref.name, Box.whole(ref.shape), ref.shape, target))
            size += ref.nbytes
            if size >= _GROUP:
                reader.load(group)
                progress.advance(size)
                group, size = [], 0
        if group:
            reader.load(group)
            progress.advance(size)
    finally:
        progress.end()


def _refuse_more_than_there_is(record: Record, wanted: Mapping[str, Ref]) -> None:
    """Before anything is allocated. One tensor may have several names."""
    there = sum(shard.size for shard in record.shards)
    sizes = {ref.name: ref.nbytes for ref in wanted.values()}
    if sum(sizes.values()) > there:
        raise ShardInvalid(f"the tensors of step {record.step} are larger than its {there} bytes")


def _layout(found: Mapping[str, Ref], about: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(the beginning of a safetensors file, each tensor's bytes after it); the widest dtypes first, so that all are
    aligned."""
    places: dict[str, tuple[int, int]] = {}
    header: dict[str, Any] = {"__metadata__": dict(about)}
    at = 0
    for name, ref in sorted(found.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        places[name] = at, at + ref.nbytes
        header[name] = {
            "dtype": to_name(ref.dtype),
            "shape": list(ref.shape),
            "data_offsets": list(places[name]),
        }
        at += ref.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text, places


@contextlib.contextmanager
def _temporary(output: Path) -> Iterator[Path]:
    if output.is_dir():
        raise CheckpointConfigError(f"{output} is a folder; name a file")
    path = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> None:
    """Raises OSError for a full disk: later, a write through a mapping would be a SIGBUS."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, data: bytearray, begin: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], begin + done)
