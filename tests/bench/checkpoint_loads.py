"""Loading one checkpoint in a fresh process: ours from the bucket and from this node, and as other libraries do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import checkpoint_states as states
from tests.bench.checkpoint_savers import Places, Saver, use_saver

LOADS = {
    "trainyard from S3": "trainyard to S3",
    "trainyard from this node": "trainyard to S3",
    "trainyard from a directory": "trainyard to a directory",
    "torch.load of a file": "torch.save to a file",
    "DCP load, files": "DCP save, files",
    "DCP load, fsspec from S3": "DCP save, fsspec to S3",
}
"""What is loaded, and which saver has written it."""


def write(settings: dict[str, Any]) -> dict[str, Any]:
    """Leaves one save of each of `settings["cases"]`. Ours keeps it on this node, too."""
    import torch

    from tests.bench.checkpoint_cases import Steps, places

    torch.set_num_threads(1)
    state = states.make(settings["bytes"])
    steps = Steps()

    def use(saver: Saver) -> None:
        saver.save(0)
        steps.until(saver.done)

    for case in settings["cases"]:
        use_saver(case, state, places(settings, case), use)
    return {"bytes": state.nbytes}


def load(settings: dict[str, Any]) -> dict[str, Any]:
    """By case, seconds from the first request until all tensors are there; with `watch`, what it took at most of memory."""
    import torch

    from tests.bench.checkpoint_cases import places
    from tests.bench.checkpoint_memory import Watch

    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    memory: dict[str, Any] = {}
    watch = Watch() if settings["watch"] else None
    for case in settings["cases"]:
        where = places(settings, LOADS[case])
        ready = _ready(case, where, settings["bytes"])
        looking: Any = watch.during() if watch else contextlib.nullcontext({})
        with looking as found:
            begin = time.perf_counter()
            value = ready()
            seconds[case] = time.perf_counter() - begin
        memory[case] = found
        if not settings["bytes"] <= _nbytes(value) < 1.001 * settings["bytes"] + 64:
            raise RuntimeError(f"{case}: {_nbytes(value)} bytes were loaded, not {settings['bytes']}")
        del value, ready
    if watch:
        watch.close()
    return {"seconds": seconds, "memory": memory}


def _ready(case: str, where: Places, nbytes: int) -> Callable[[], Any]:
    """What is left to be timed, with the imports done."""
    if case.startswith("trainyard"):
        return _ours(case, where)
    if case.startswith("torch.load"):
        import torch

        return lambda: torch.load(where.folder / "0.pt", weights_only=True)
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    # DCP loads into what is there: so its memory is that of a state that was made before, and counts as loaded.
    state = states.make(nbytes).for_dcp()
    fsspec = case.endswith("S3")
    reader = FsspecReader(f"{where.uri}/0") if fsspec else FileSystemReader(where.folder / "0")

    def call() -> Any:
        dcp_load(state, storage_reader=reader, no_dist=True)
        return state

    return call


def _ours(case: str, where: Places) -> Callable[[], Any]:
    import torch.distributed.tensor  # noqa: F401 - what loading imports

    from trainyard.checkpoint.commitlog import CommitLog
    from trainyard.checkpoint.config import CheckpointConfig
    from trainyard.checkpoint.loading import load_state
    from trainyard.checkpoint.reader import CheckpointReader
    from trainyard.checkpoint.sources import FolderSource, Source, StoreSource
    from trainyard.checkpoint.stores import open_store
    from trainyard_api.checkpoints import commits_newest_first

    uri = f"file://{where.folder}/ours" if case.endswith("directory") else where.uri
    store = open_store(CheckpointConfig(uri=uri, run="bench"))
    node = case.endswith("node")
    source: Source = (
        FolderSource(Path(os.environ["TRAINYARD_RUNTIME_DIR"]) / "staging") if node else StoreSource(store)
    )

    def call() -> Any:
        (record, *_) = commits_newest_first(CommitLog(store, "bench").refresh())
        return load_state(CheckpointReader(record, [source]), 0).main

    return call


def _nbytes(value: Any) -> int:
    """Of all tensors in it; to be sure that they were read."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
