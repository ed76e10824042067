"""Weights & Biases."""

from __future__ import annotations

import logging
import os
import secrets
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger
from trainyard.loggers.checkpoints import LogModel, SavedModel, Uploads
from trainyard.loggers.deadline import CONNECT_SECONDS, FAILED_SECONDS, bounded
from trainyard.loggers.extras import require
from trainyard.loggers.identity import run_key
from trainyard.loggers.ranks import is_rank_zero, rank_zero_experiment, rank_zero_only
from trainyard.loggers.values import add_prefix, as_dict, jsonable

if TYPE_CHECKING:
    from wandb import Artifact
    from wandb.sdk.wandb_run import Run

    from trainyard.callbacks.model_checkpoint import ModelCheckpoint

_log = logging.getLogger("trainyard")

STEP = "trainer/global_step"
"""The x axis of all charts: W&B's own step counts calls."""
_ID_LETTERS = string.ascii_lowercase + string.digits


class WandbLogger(Logger):
    """`lightning.pytorch.loggers.WandbLogger`: same arguments. Raises ModuleNotFoundError.

    `kwargs` go to `wandb.init`. A server that does not answer makes the run an offline one, to be sent later with
    `wandb sync`. Artifacts are kept in offline runs, too. A resumed fit goes on with the same run.
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, name: str | None = None, save_dir: str | Path = ".", version: str | None = None,
        offline: bool = False, dir: str | Path | None = None, id: str | None = None, anonymous: bool | None = None,
        project: str | None = None, log_model: LogModel = False, experiment: Run | None = None, prefix: str = "",
        checkpoint_name: str | None = None, add_file_policy: Literal["mutable", "immutable"] = "mutable", **kwargs: Any,
    ) -> None:  # fmt: skip
        require("wandb", "wandb", "WandbLogger")
        if add_file_policy not in ("mutable", "immutable"):
            raise MisconfigurationException(
                f"add_file_policy: {add_file_policy!r} is not 'mutable' or 'immutable'"
            )
        if anonymous:
            _log.warning(
                "WandbLogger(anonymous=%s): W&B has no anonymous runs any more; log in instead", anonymous
            )
        self._offline = offline
        self._save_dir = str(dir if dir is not None else save_dir)
        self._project = project or os.environ.get("WANDB_PROJECT") or "lightning_logs"
        self._run_name = name
        self._id: str | None = version or id or kwargs.pop("run_id", None)
        self._given = self._id is not None
        self._prefix = prefix
        self._experiment = experiment
        self._checkpoint_name = checkpoint_name
        self._add_file_policy = add_file_policy
        self._kwargs = kwargs
        self._uploads = Uploads(log_model)
        key = None if self._given else run_key("wandb", self._project, name)
        self._key = None if key is None else key[:16]
        self._goes_on = False
        """An earlier attempt has logged to this run."""
        self._known_to: int | None = None
        """The newest step that W&B has from the earlier attempt; earlier ones need not be sent again."""

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned: they attach to the same run."""
        return {**self.__dict__, "_experiment": None, "_id": self.version}

    # ---- the run

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str | None:
        """The run's id: the given one, the running run's, this TrainingRun's, or (on rank 0) a new one."""
        if self._experiment is not None:
            return str(self._experiment.id)
        if self._id is None:
            running = getattr(sys.modules.get("wandb"), "run", None)
            if running is not None:
                self._id = str(running.id)
            elif self._key is not None:
                self._id = self._key
            elif is_rank_zero():
                self._id = "".join(secrets.choice(_ID_LETTERS) for _ in range(8))
        return self._id

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """Raises wandb.errors.Error; never takes longer than `init_timeout` (30 s by default)."""
        if self._experiment is None:
            import wandb

            if wandb.run is not None:
                _log.warning(
                    "WandbLogger goes on with the run %s that is active already; call wandb.finish() before for one of its own",
                    wandb.run.id,
                )
                run = wandb.run
            else:
                run = self._open()
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP, step_sync=True)
            self._experiment = run
            if self._goes_on:
                self._known_to = _last_step(run)
        elif self._goes_on and self._known_to is None:
            self._known_to = _last_step(self._experiment)
        return self._experiment

    def _open(self) -> Run:
        import wandb

        Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        wanted: dict[str, Any] = {
            "name": self._run_name, "project": self._project, "dir": self._save_dir, "id": self.version,
            "resume": "allow", **self._kwargs,
        }  # fmt: skip
        wanted["settings"] = _with_limits(wanted.get("settings"))
        if self._offline:
            wanted["mode"] = "offline"
        try:
            return wandb.init(**wanted)
        except (wandb.errors.CommError, TimeoutError) as error:
            if wanted.get("mode") == "offline":
                raise
            _log.warning(
                "W&B cannot be reached (%s): the run %s is kept in %s; send it later with wandb sync",
                str(error).partition("\n")[0], wanted["id"], self._save_dir,
            )  # fmt: skip
            # The service process still holds the run that could not be opened, under the same id.
            bounded(wandb.teardown, CONNECT_SECONDS, "W&B's service")
            return wandb.init(**{**wanted, "mode": "offline"})

    # ---- what is logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Anything that `wandb.log` takes."""
        run = self.experiment
        named = add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)
        if step is None:
            run.log(named)
        elif self._known_to is None or step >= self._known_to:
            run.log({**named, STEP: step})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        config: Any = self.experiment.config
        config.update(jsonable(as_dict(params)), allow_val_change=True)

    def log_table(
        self, key: str, columns: list[str | int] | None = None, data: list[list[Any]] | None = None, dataframe: Any = None,
        step: int | None = None,
    ) -> None:  # fmt: skip
        """Rows, or a pandas DataFrame. Cells may be wandb media."""
        if is_rank_zero():
            import wandb

            self.log_metrics({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    def log_text(
        self, key: str, columns: list[str | int] | None = None, data: list[list[str]] | None = None, dataframe: Any = None,
        step: int | None = None,
    ) -> None:  # fmt: skip
        """A table of texts."""
        self.log_table(key, columns, data, dataframe, step)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Tensors (C, H, W), arrays (H, W, C), PIL images or paths; each keyword is a list with an entry per image."""
        self._log_media("Image", key, images, step, kwargs)

    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Paths, or arrays with sample_rate=[...] (then W&B wants soundfile)."""
        self._log_media("Audio", key, audios, step, kwargs)

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Paths, or arrays (T, C, H, W) (then W&B wants moviepy)."""
        self._log_media("Video", key, videos, step, kwargs)

    @rank_zero_only
    def _log_media(
        self, kind: str, key: str, items: list[Any], step: int | None, kwargs: Mapping[str, Sequence[Any]]
    ) -> None:
        if not isinstance(items, list):
            raise TypeError(f"log_{kind.lower()}({key!r}): expected a list, found {type(items).__name__}")
        for name, values in kwargs.items():
            if len(values) != len(items):
                raise ValueError(
                    f"log_{kind.lower()}({key!r}): {name} has {len(values)} entries for {len(items)} items"
                )
        import wandb

        make = getattr(wandb, kind)
        media = [make(item, **{n: v[i] for n, v in kwargs.items()}) for i, item in enumerate(items)]
        self.log_metrics({key: media}, step)

    @rank_zero_only
    def watch(
        self,
        model: Any,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 100,
        log_graph: bool = True,
    ) -> None:
        """Histograms of gradients ("gradients", "parameters", "all" or None) every `log_freq` batches."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    # ---- artifacts

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        for model in self._uploads.now(checkpoint_callback):
            self._upload(model)

    def _upload(self, model: SavedModel) -> None:
        import wandb

        run = self.experiment
        artifact = wandb.Artifact(
            self._checkpoint_name or f"model-{run.id}", type="model", metadata=jsonable(model.metadata)
        )
        if model.path.is_dir():
            artifact.add_dir(str(model.path), name="model.ckpt", policy=self._add_file_policy)
        else:
            artifact.add_file(str(model.path), name="model.ckpt", policy=self._add_file_policy)
        run.log_artifact(artifact, aliases=list(model.aliases))

    @staticmethod
    def download_artifact(
        artifact: str, save_dir: str | Path | None = None, artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str:  # fmt: skip
        """Folder with its files. With a run active and `use_artifact`, W&B notes that the run used it."""
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact, type=artifact_type)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return str(found.download(root=None if save_dir is None else str(save_dir)))

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Artifact:
        return self.experiment.use_artifact(artifact, type=artifact_type)

    # ---- the end, and resume

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The run stays open after a success, as in Lightning, for what the script logs after fit; wandb ends it when
        the process ends, or `close` does."""
        if self._experiment is None:
            return
        if status == "success":
            for model in self._uploads.at_end():
                self._upload(model)
        elif status == "failed":
            run, self._experiment = self._experiment, None
            self._id = str(run.id)
            bounded(lambda: run.finish(exit_code=1), FAILED_SECONDS, "W&B's end of the run")

    def close(self) -> None:
        """Waits until all is sent, at most `finish_timeout` (10 min by default)."""
        if self._experiment is not None:
            run, self._experiment = self._experiment, None
            self._id = str(run.id)
            run.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self.version}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not self._given and self._experiment is None and state_dict.get("id"):
            self._id = str(state_dict["id"])

    def resume(self, step: int) -> None:
        """W&B cannot take back what it has. What comes again is the same, so it is not sent a second time."""
        self._goes_on = step > 0 or (
            self._experiment is None and self._id is not None and self._id == self._key
        )


def _last_step(run: Run) -> int | None:
    """What the server says that the run has logged already."""
    summary: Any = run.summary
    last = summary.get(STEP)
    return int(last) if isinstance(last, (int, float)) else None


def _with_limits(settings: Any) -> Any:
    """W&B waits 90 s for a server that is away, at the end for ever, and holds data back from the disk for 15 s, which a
    killed process loses. Whoever sets these himself is obeyed."""
    import wandb

    limits = {
        "init_timeout": CONNECT_SECONDS,
        "finish_timeout": 600.0,
        "x_transaction_log_flush_interval": 1.0,
    }
    own = (
        settings.model_copy() if isinstance(settings, wandb.Settings) else wandb.Settings(**(settings or {}))
    )
    for name, value in limits.items():
        known = name in type(own).model_fields  # those that start with x_ come and go
        if known and name not in own.model_fields_set and f"WANDB_{name.upper()}" not in os.environ:
            setattr(own, name, value)
    return own
