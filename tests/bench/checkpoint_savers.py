"""The ways of saving that `./dev bench checkpoint` compares: each as its library's documentation has it, and, where it has
one, with the option that makes repeated saves cheaper.

A saver's `save` is what the training thread calls; what it leaves to be done elsewhere is over when `done` says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.bench.checkpoint_states import TrainState

BUCKET = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where one process saves to. Nobody else uses them."""

    folder: Path
    memory: Path
    """A folder on tmpfs, where there is one."""
    prefix: str
    """In the bucket."""

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"


class Saver(Protocol):
    def rest(self) -> None:
        """Let what goes on beside the training come to its end: between two saves lie minutes."""
        ...

    def save(self, number: int) -> None: ...

    def done(self) -> bool:
        """Whether the last save is whole and where it should be. To be asked by the training thread. Raises if it failed."""
        ...

    def clean(self, number: int) -> None:
        """Delete it, so that the disk has room for the next."""
        ...


class _Restless:
    def rest(self) -> None:
        pass


class _Blocking(_Restless):
    def done(self) -> bool:
        return True


class MemoryCopy(_Blocking):
    """The yardstick: into memory that is allocated by the first save and written again by the others."""

    def __init__(self, state: TrainState, places: Places) -> None:
        self._from = state.tensors
        self._to: list[Any] = []

    def save(self, number: int) -> None:
        import torch

        self._to = self._to or [torch.empty_like(t) for t in self._from]
        for target, source in zip(self._to, self._from, strict=True):
            target.copy_(source)

    def clean(self, number: int) -> None:
        pass


class Ours:
    """The engine, as the Trainer calls it. With a bucket its uploader is a process; with a directory, a thread."""

    def __init__(
        self, state: TrainState, places: Places, *, local: bool = False, in_memory: bool = False
    ) -> None:
        """`in_memory`: what is staged lies on tmpfs; else in a folder of the disk."""
        from trainyard.checkpoint.config import CheckpointConfig
        from trainyard.checkpoint.engine import Checkpointer
        from trainyard.peers import Alone
        from trainyard_api.contract import Env

        uri = f"file://{places.folder}/ours" if local else places.uri
        # With a folder that stays, the newest checkpoint stays in it.
        config = CheckpointConfig(
            uri=uri, run="bench", every_n_steps=1 << 30, keep=2, local=Env.RUNTIME_DIR in os.environ
        )
        tempfile.tempdir = str(places.memory if in_memory else places.folder)
        self._state = state
        self._engine = Checkpointer(config, Alone(), {})
        if self._engine.open() is not None:
            raise RuntimeError(f"{uri} is not empty")
        self._engine.prepare(state.nbytes)
        self._step = 0

    def rest(self) -> None:
        self._engine._staging._settle()

    def save(self, number: int) -> None:
        from trainyard_api.checkpoints import Cursor

        self._step = number + 1
        if not self._engine.save(self._step, Cursor(), self._payload, reason="steps"):
            raise RuntimeError("the save before is still on its way")

    def _payload(self) -> Any:
        from trainyard.checkpoint.payload import Payload

        return Payload(checkpoint=self._state.in_lightnings_layout(), own={"rng": {"seed": 1}})

    def done(self) -> bool:
        self._engine.due(self._step, epoch_end=False)
        return self._engine.committed_step == self._step

    def clean(self, number: int) -> None:
        pass

    def close(self) -> None:
        self._engine.close(failed=False)


class TorchSave(_Blocking):
    def __init__(self, state: TrainState, places: Places, *, upload: bool = False) -> None:
        self._state, self._places, self._upload = state, places, upload
        self._s3 = bare_client() if upload else None

    def save(self, number: int) -> None:
        import torch

        path = self._path(number)
        torch.save(self._state.in_lightnings_layout(), path)
        if self._s3 is not None:
            self._s3.upload_file(str(path), BUCKET, f"{self._places.prefix}/{path.name}")

    def clean(self, number: int) -> None:
        self._path(number).unlink()
        if self._s3 is not None:
            self._s3.delete_object(Bucket=BUCKET, Key=f"{self._places.prefix}/{self._path(number).name}")

    def _path(self, number: int) -> Path:
        return self._places.folder / f"{number}.pt"


class Dcp(_Restless):
    """torch.distributed.checkpoint in a world of one."""

    def __init__(
        self,
        state: TrainState,
        places: Places,
        *,
        kind: str = "",
        keep_buffers: bool = False,
        fsspec: bool = False,
    ) -> None:
        """`kind`: "thread" or "process"; else the save is synchronous. `keep_buffers`: what is staged into is kept from save
        to save, as DefaultStager does; by default it is allocated anew."""
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._state, self._places, self._kind, self._fsspec = state, places, kind, fsspec
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=kind == "process", use_async_staging=False,
            use_non_blocking_copy=False,
        )  # fmt: skip
        self._stager = DefaultStager(options) if keep_buffers else None
        self._pending: Any = None

    def save(self, number: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

        writer = self._writer(number)
        if not self._kind:
            save(self._state.for_dcp(), storage_writer=writer)
            return
        self._pending = async_save(
            self._state.for_dcp(), storage_writer=writer, async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType[self._kind.upper()],
        )  # fmt: skip

    def _writer(self, number: int) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.fsspec_filesystem import FsspecWriter

        if self._fsspec:
            return FsspecWriter(f"{self._places.uri}/{number}")
        # Neither do the others wait for the disk.
        return FileSystemWriter(self._places.folder / str(number), sync_files=False)

    def done(self) -> bool:
        if self._pending is None:
            return True
        if not self._pending.done():
            return False
        self._pending.result()
        self._pending = None
        return True

    def clean(self, number: int) -> None:
        if self._fsspec:
            import s3fs  # type: ignore[import-not-found]

            s3fs.S3FileSystem().rm(f"{BUCKET}/{self._places.prefix}/{number}", recursive=True)
        else:
            shutil.rmtree(self._places.folder / str(number))


class Lightning(_Restless):
    """`trainer.save_checkpoint`, which is what ModelCheckpoint calls, inside of a fit's hook."""

    def __init__(self, trainer: Any, places: Places, *, background: bool) -> None:
        self._trainer, self._places, self._background = trainer, places, background

    def save(self, number: int) -> None:
        self._trainer.save_checkpoint(self._path(number))

    def done(self) -> bool:
        if not self._background:
            return True
        plugin = self._trainer.strategy.checkpoint_io
        if plugin._error:
            raise plugin._error
        # One thread does all: what is asked of it now is done after the save.
        if not hasattr(plugin, "_bench_mark"):
            plugin._bench_mark = plugin._executor.submit(int)
        if not plugin._bench_mark.done():
            return False
        del plugin._bench_mark
        return True

    def clean(self, number: int) -> None:
        self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self._places.folder / f"{number}.ckpt"


def lightning(state: TrainState, places: Places, use: Callable[[Saver], None], *, background: bool) -> None:
    """Calls `use` within a fit that has `state` as its module's and its optimizer's."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer  # type: ignore[import-not-found]
    from lightning.pytorch.plugins.io import AsyncCheckpointIO  # type: ignore[import-not-found]

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = state.module
            self.tiny = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.tiny.sum()

        def configure_optimizers(self) -> Any:
            return state.optimizer

    class Use(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            use(Lightning(trainer, places, background=background))

    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=1, callbacks=[Use()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=places.folder,
        plugins=[AsyncCheckpointIO()] if background else None,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1, 1))))


@contextlib.contextmanager
def _with(saver: Any) -> Iterator[Any]:
    try:
        yield saver
    finally:
        close = getattr(saver, "close", None)
        if close is not None:
            close()


SAVERS: dict[str, tuple[type, dict[str, Any]]] = {
    "memory copy": (MemoryCopy, {}),
    "trainyard to S3": (Ours, {}),
    "trainyard to S3, staged on tmpfs": (Ours, {"in_memory": True}),
    "trainyard to a directory": (Ours, {"local": True}),
    "torch.save to a file": (TorchSave, {}),
    "torch.save, then boto3": (TorchSave, {"upload": True}),
    "DCP save, files": (Dcp, {}),
    "DCP async thread, files": (Dcp, {"kind": "thread"}),
    "DCP async thread, files, buffers kept": (Dcp, {"kind": "thread", "keep_buffers": True}),
    "DCP async process, files": (Dcp, {"kind": "process"}),
    "DCP async process, files, buffers kept": (Dcp, {"kind": "process", "keep_buffers": True}),
    "DCP save, fsspec to S3": (Dcp, {"fsspec": True}),
    "DCP async thread, fsspec to S3": (Dcp, {"kind": "thread", "fsspec": True}),
}
LIGHTNING = {"Lightning to a file": False, "Lightning AsyncCheckpointIO to a file": True}
CASES = (*SAVERS, *LIGHTNING)
YARDSTICK = "memory copy"
OURS_IN_A_RUN = "trainyard's Trainer to S3"
"""Measured in a run of its own: `checkpoint_runs.train`."""


def use_saver(case: str, state: TrainState, places: Places, use: Callable[[Saver], None]) -> None:
    """Call `use` with a saver that is ready. Raises KeyError for an unknown case."""
    if case in LIGHTNING:
        lightning(state, places, use, background=LIGHTNING[case])
        return
    kind, options = SAVERS[case]
    with _with(kind(state, places, **options)) as saver:
        use(saver)


def bare_client(**config: Any) -> Any:
    """boto3's, with its defaults but for what is given."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        config=Config(s3={"addressing_style": "path"}, **config),
    )  # fmt: skip
