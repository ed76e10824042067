"""ModelCheckpoint: `.ckpt` files of the best, the last, or all states of a fit."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from trainyard.callbacks import checkpoint_folder as files
from trainyard.callbacks import checkpoint_names as names
from trainyard.callbacks.checkpoint import Checkpoint
from trainyard.callbacks.checkpoint_arguments import Triggers, check_arguments
from trainyard.callbacks.checkpoint_moments import (
    default_dirpath,
    not_now,
    saves_at_epoch_end,
    validation_follows,
)
from trainyard.callbacks.checkpoint_records import CheckpointRecords, as_tensor
from trainyard.callbacks.checkpoint_topk import TopK
from trainyard.callbacks.on_exception_checkpoint import save_after_failure
from trainyard.checkpoint.triggers import TimeTrigger
from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")
__all__ = ["Checkpoint", "ModelCheckpoint"]


class ModelCheckpoint(CheckpointRecords):
    """`lightning.pytorch.callbacks.ModelCheckpoint`: same arguments, attributes, file names and state.

    Rank 0 decides, on its value of `monitor`, and tells the others. `dirpath` may be `s3://bucket/prefix`. With
    `save_last` last.ckpt is written whenever a checkpoint is due, whether or not it is among the best. Raises
    MisconfigurationException for arguments that do not go together, and for a `monitor` that nobody has logged when a
    validation has run.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, dirpath: str | Path | None = None, filename: str | None = None, monitor: str | None = None,
        verbose: bool = False, save_last: bool | Literal["link"] | None = None, save_top_k: int = 1,
        save_on_exception: bool = False, save_weights_only: bool = False, mode: str = "min",
        auto_insert_metric_name: bool = True, every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None, every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None, enable_version_counter: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(None if dirpath is None else files.whole(dirpath), TopK(save_top_k, mode))
        check_arguments(monitor=monitor, mode=mode, save_top_k=save_top_k, save_last=save_last)
        self.triggers = Triggers.of(every_n_train_steps, every_n_epochs, train_time_interval)
        self.monitor, self.mode, self.verbose = monitor, mode, verbose
        self.save_last, self.save_top_k, self.save_weights_only = save_last, save_top_k, save_weights_only
        self.save_on_exception = save_on_exception
        self.auto_insert_metric_name = auto_insert_metric_name
        self.enable_version_counter = enable_version_counter
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self.filename = filename or None
        self._time: TimeTrigger | None = None
        self._asked_step = 0
        self._validated = False
        self._warned = False

    # ---- what users read

    @property
    def every_n_epochs(self) -> int | None:
        return self.triggers.every_n_epochs

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            monitor=self.monitor, mode=self.mode, every_n_train_steps=self.triggers.every_n_train_steps,
            every_n_epochs=self.triggers.every_n_epochs, train_time_interval=self.triggers.train_time_interval,
        )  # fmt: skip

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None,
        prefix: str | None = None,
    ) -> str:  # fmt: skip
        """The file's whole path. Raises MisconfigurationException for a template that cannot be filled."""
        equals, joint = self.CHECKPOINT_EQUALS_CHAR, self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename
        if template is None:
            name = names.fill(f"{{epoch}}{joint}{{step}}", metrics, equals=equals)
        else:
            name = names.fill(template, metrics, insert_names=self.auto_insert_metric_name, equals=equals)
        name = name if prefix is None else f"{prefix}{joint}{name}"
        name = name if ver is None else f"{name}{joint}v{ver}"
        return files.join(self.dirpath, name + self.FILE_EXTENSION)

    def file_exists(self, filepath: str | Path, trainer: Trainer) -> bool:
        """Collective: as rank 0 sees it."""
        return bool(trainer.strategy.peers.broadcast(trainer.is_global_zero and files.exists(str(filepath))))

    def check_monitor_top_k(self, trainer: Trainer, current: torch.Tensor | None = None) -> bool:
        """Collective: whether rank 0's `current` is among the best k."""
        admits = current is not None and self.top.admits(float(current))
        return bool(trainer.strategy.peers.broadcast(admits))

    def to_yaml(self, filepath: str | Path | None = None) -> None:
        """Write the scores by path; by default into `best_k_models.yaml` in the folder."""
        lines = [f"{path}: {float(score)}\n" for path, score in self._scores.items()]
        place = Path(filepath or files.join(self.dirpath, "best_k_models.yaml"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(lines) or "{}\n")

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        found: str | None = None
        if trainer.is_global_zero:
            found = self._given_dirpath or files.whole(default_dirpath(trainer))
        self.dirpath = trainer.strategy.peers.broadcast(found)
        if trainer.is_global_zero and self.dirpath is not None and not trainer.fast_dev_run:
            there = files.listing(self.dirpath, self.FILE_EXTENSION)
            self.folder.others = there - self.folder.own
            if there and self.save_top_k != 0 and self.verbose:
                _log.info("checkpoint directory %s is not empty", self.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._agree(trainer)
        self._asked_step = trainer.global_step
        interval = self.triggers.train_time_interval
        if interval is not None:
            self._time = TimeTrigger(
                interval.total_seconds(), leader=trainer.is_global_zero,
                broadcast=lambda verdict: tuple(trainer.strategy.peers.broadcast(verdict)),
            )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._asked_step:  # in the middle of an accumulation
            return
        self._asked_step = step
        every = self.triggers.every_n_train_steps
        if not (every and step % every == 0) and not (self._time is not None and self._time.due(step)):
            return
        if self.monitor is not None and self._is_stale(trainer) and validation_follows(trainer):
            self._deferred = True
        else:
            self._save_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validated = True
        due, self._deferred = self._deferred, False
        if due or (
            not saves_at_epoch_end(trainer, self._save_on_train_epoch_end) and self._epoch_due(trainer)
        ):
            self._save_due(trainer)
        self._sweep(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due, self._deferred = self._deferred, False  # a validation that did not come after all
        if due or (saves_at_epoch_end(trainer, self._save_on_train_epoch_end) and self._epoch_due(trainer)):
            self._save_due(trainer)
        self._sweep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.sweep(None)  # the last state is committed by now, and needs none of them

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self.save_on_exception or not_now(trainer, self._saved_step):
            return
        metrics, weights = self._metrics(trainer), self.save_weights_only
        path = self.format_checkpoint_name(metrics)
        if not save_after_failure(trainer, path, exception, weights_only=weights):
            return
        self._saved_step = trainer.global_step
        last = self.last_model_path or self._free(trainer, metrics, None, self.CHECKPOINT_NAME_LAST)
        if self.save_last == "link" and not files.is_remote(last) and trainer.is_global_zero:
            files.link(path, last)
        elif self.save_last:
            save_after_failure(trainer, last, exception, weights_only=weights)

    def _epoch_due(self, trainer: Trainer) -> bool:
        every = self.triggers.every_n_epochs
        return every > 0 and (trainer.current_epoch + 1) % every == 0

    def _is_stale(self, trainer: Trainer) -> bool:
        """Whether the value of `monitor` is that of an earlier validation, or not there yet."""
        return self.monitor in trainer.validation_metrics or self.monitor not in trainer.callback_metrics

    # ---- what

    def _metrics(self, trainer: Trainer) -> dict[str, Any]:
        return names.with_position(
            trainer.callback_metrics, epoch=trainer.current_epoch, step=trainer.global_step
        )

    def _save_due(self, trainer: Trainer) -> None:
        """Collective."""
        if not_now(trainer, self._saved_step):
            return
        decision = trainer.strategy.peers.broadcast(self._decide(trainer) if trainer.is_global_zero else None)
        if "error" in decision:
            raise MisconfigurationException(decision["error"])
        if decision["file"] is not None:
            self._save_file(trainer, decision["file"], decision["score"])
        if decision["last"] is not None:
            self._save_last(trainer, decision["last"])
        self._saved_step = trainer.global_step
        if self._time is not None:
            self._time.saved()
        self._sweep(trainer)

    def _decide(self, trainer: Trainer) -> dict[str, Any]:
        """On rank 0: what to write."""
        metrics = self._metrics(trainer)
        decision: dict[str, Any] = {"file": None, "score": None, "last": None}
        if self.monitor is None:
            if self.save_top_k != 0:
                leaving = self.best_model_path if self.save_top_k == 1 else None
                decision["file"] = self._free(trainer, metrics, leaving)
        elif self.monitor not in metrics:
            text = (
                f"ModelCheckpoint(monitor={self.monitor!r}): nothing was logged under that name; "
                f"there is: {', '.join(sorted(metrics))}"
            )
            if self._validated:
                return {"error": text}
            if not self._warned:
                _log.warning("%s. Nothing is saved until there is", text)
            self._warned = True
            return decision
        else:
            decision["score"] = score = self.top.score(float(metrics[self.monitor]))
            if self.top.k != 0 and self.top.admits(score):
                decision["file"] = self._free(trainer, metrics, self.top.leaving())
            elif self.verbose:
                _log.info("%s = %g is not among the best %d", self.monitor, score, self.save_top_k)
        linkable = self.save_last == "link" and self.save_top_k != 0
        if self.save_last and (decision["file"] or not linkable):
            decision["last"] = self._free(trainer, metrics, self.last_model_path, self.CHECKPOINT_NAME_LAST)
        return decision

    def _free(
        self, trainer: Trainer, metrics: Mapping[str, Any], leaving: str | None, template: str | None = None
    ) -> str:
        """A path for the metrics; `leaving` may be overwritten."""
        others = [c.folder for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c is not self]

        def taken(path: str) -> bool:
            return path != leaving and (self.folder.taken(path) or any(path in f.own for f in others))

        def name(version: int | None) -> str:
            return self.format_checkpoint_name(metrics, template, ver=version)

        if not self.enable_version_counter:
            return name(None)
        return names.first_free(name, taken, start=self.STARTING_VERSION)

    def _save_file(self, trainer: Trainer, path: str, score: float | None) -> None:
        # First said, then saved: the file is to hold what is true once it is written.
        if score is None:
            leaving = self.best_model_path if self.save_top_k == 1 else None
            self.best_model_path = path
        else:
            leaving = self.top.leaving()
            self.top.add(path, score)
            self.current_score = as_tensor(score)
            self._show_scores()
        self._write(trainer, path, leaving)
        self._newest = path

    def _save_last(self, trainer: Trainer, path: str) -> None:
        previous, self.last_model_path = self.last_model_path, path
        if self.save_last == "link" and self._newest and not files.is_remote(path):
            if trainer.is_global_zero:
                files.link(self._newest, path)
                self._replaces(trainer, path, previous)
            return
        self._write(trainer, path, previous)

    def _write(self, trainer: Trainer, path: str, leaving: str | None) -> None:
        if trainer.is_global_zero:
            self._replaces(trainer, path, leaving)
        trainer.save_checkpoint(path, self.save_weights_only)
        if not trainer.is_global_zero:
            return
        if self.verbose:
            _log.info("saved %s", path)
        trainer.metrics.each_logger(lambda logger: logger.after_save_checkpoint(weakref.proxy(self)))

    def _replaces(self, trainer: Trainer, path: str, leaving: str | None) -> None:
        self.folder.wrote(path)
        resumed_from = trainer.ckpt_path and files.whole(trainer.ckpt_path)
        if leaving and leaving not in (path, resumed_from):
            self.folder.retire(leaving, trainer.global_step)

    def _sweep(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self.folder.sweep(files.committed_step(trainer))

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """For `ckpt_path="last"`: what earlier runs have left as last.ckpt, of any version."""
        folder = self.dirpath or files.whole(default_dirpath(trainer))
        last = names.fill(self.CHECKPOINT_NAME_LAST, {}, equals=self.CHECKPOINT_EQUALS_CHAR)
        found = files.listing(folder, self.FILE_EXTENSION)
        return {
            path for path in found if Path(path).name.startswith(last.split(self.CHECKPOINT_EQUALS_CHAR)[0])
        }
