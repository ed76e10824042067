"""Comet."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from trainyard.loggers.base import Logger
from trainyard.loggers.checkpoints import LogModel, SavedModel, Uploads
from trainyard.loggers.deadline import CONNECT_SECONDS, FAILED_SECONDS, bounded
from trainyard.loggers.extras import require
from trainyard.loggers.identity import run_key
from trainyard.loggers.ranks import is_rank_zero, rank_zero_experiment, rank_zero_only
from trainyard.loggers.values import as_dict, flatten, jsonable, number, plain

if TYPE_CHECKING:
    from comet_ml import CometExperiment

    from trainyard.callbacks.model_checkpoint import ModelCheckpoint

_log = logging.getLogger("trainyard")

_OLD_NAMES = {"experiment_name": "name", "save_dir": "offline_directory"}
"""Of arguments that Lightning's CometLogger had before 2.5."""


class CometLogger(Logger):
    """`lightning.pytorch.loggers.CometLogger`: same keyword-only arguments. Raises ModuleNotFoundError.

    `kwargs` go to `comet_ml.ExperimentConfig`. `online=False` writes an archive for `comet upload` (in Lightning it
    switches everything off); a server that does not answer makes the experiment such an offline one. Ours:
    `log_model`, as in WandbLogger. A resumed fit goes on with the same experiment.
    """

    def __init__(
        self, *, api_key: str | None = None, workspace: str | None = None, project: str | None = None,
        experiment_key: str | None = None, mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None, prefix: str | None = None, log_model: LogModel = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        require("comet_ml", "comet", "CometLogger")
        project = project or kwargs.pop("project_name", None)
        if "offline" in kwargs:
            online = not kwargs.pop("offline") if online is None else online
        for old, new in _OLD_NAMES.items():
            if old in kwargs:
                kwargs.setdefault(new, kwargs.pop(old))
        self._api_key, self._workspace, self._project = api_key, workspace, project
        self._key, self._mode, self._online = experiment_key, mode, online
        self._given = experiment_key is not None or "COMET_EXPERIMENT_KEY" in os.environ
        self._prefix = prefix
        self._kwargs = kwargs
        self._uploads = Uploads(log_model)
        key = None if self._given else run_key("comet", workspace, project, kwargs.get("name"))
        self._run_key = None if key is None else key[:32]
        self._goes_on = False
        """The experiment may be there already."""
        self._experiment: CometExperiment | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned: they go on with the same experiment."""
        return {**self.__dict__, "_experiment": None, "_key": self.version, "_goes_on": True}

    # ---- the experiment

    @property
    def name(self) -> str | None:
        """The project's."""
        return self._project

    @property
    def version(self) -> str | None:
        """The experiment's key: the given one, this TrainingRun's, or (on rank 0) a new one."""
        if self._key is None:
            if "COMET_EXPERIMENT_KEY" in os.environ:
                self._key = os.environ["COMET_EXPERIMENT_KEY"]
            elif self._run_key is not None:
                self._key = self._run_key
            elif is_rank_zero():
                self._key = uuid.uuid4().hex
        return self._key

    @property
    def save_dir(self) -> str | None:
        """Of offline archives."""
        found = self._kwargs.get("offline_directory") or os.environ.get("COMET_OFFLINE_DIRECTORY")
        return None if found is None else str(found)

    @property
    @rank_zero_experiment
    def experiment(self) -> CometExperiment:
        """Raises what comet_ml raises when it cannot even work offline; never takes longer than 30 s."""
        if self._experiment is None:
            self._experiment = self._open()
            self._experiment.log_other("Created from", "trainyard")
        return self._experiment

    def _open(self) -> CometExperiment:
        # It would patch torch, and complain that it came too late for it.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        import comet_ml

        mode = "get_or_create" if self._goes_on and self._mode in (None, "create") else self._mode
        if self.save_dir is not None:
            os.makedirs(self.save_dir, exist_ok=True)  # noqa: PTH103 - a path as the user wrote it

        def start(online: bool | None) -> CometExperiment:
            return comet_ml.start(
                api_key=self._api_key, workspace=self._workspace, project_name=self._project,
                experiment_key=self.version, mode=mode, online=online,
                experiment_config=comet_ml.ExperimentConfig(**self._kwargs),
            )  # fmt: skip

        if self._online is False:
            return start(False)
        try:
            return bounded(lambda: start(self._online), CONNECT_SECONDS, "Comet")
        except (OSError, TimeoutError) as error:  # requests' errors are OSErrors
            _log.warning(
                "Comet cannot be reached (%s): the experiment %s is archived in %s; send it later with comet upload",
                type(error).__name__, self.version, self.save_dir or "the working directory",
            )  # fmt: skip
            return start(False)

    # ---- what is logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers and tensors of one element. Raises ValueError."""
        values = {name: number(value) for name, value in metrics.items()}
        epoch = values.pop("epoch", None)
        self.experiment.log_metrics(
            values, prefix=self._prefix, step=step, epoch=None if epoch is None else int(epoch)
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nested names are joined with "/"."""
        self.experiment.log_parameters({name: plain(v) for name, v in flatten(as_dict(params)).items()})

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Comet shows the module's text."""
        self.experiment.set_model_graph(model)

    # ---- artifacts

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        for model in self._uploads.now(checkpoint_callback):
            self._upload(model)

    def _upload(self, model: SavedModel) -> None:
        """Copied first: an asset is sent in the background, and the callback may delete the file before."""
        self.experiment.log_model(
            model.path.stem, str(model.path), metadata={**jsonable(model.metadata), "aliases": list(model.aliases)},
            overwrite=True, copy_to_tmp=True,
        )  # fmt: skip

    # ---- the end, and resume

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The experiment stays open after a success, as in Lightning, for what the script logs after fit; comet_ml ends
        it when the process ends, or `close` does."""
        if self._experiment is None:
            return
        if status == "failed":
            experiment, self._experiment = self._experiment, None
            self._goes_on = True
            bounded(experiment.end, FAILED_SECONDS, "Comet's end of the experiment")
            return
        if status == "success":
            for model in self._uploads.at_end():
                self._upload(model)
        bounded(self._experiment.flush, CONNECT_SECONDS, "Comet's flush")

    def close(self) -> None:
        """An offline experiment's archive is there afterwards."""
        if self._experiment is not None:
            experiment, self._experiment = self._experiment, None
            self._goes_on = True
            experiment.end()

    def state_dict(self) -> dict[str, Any]:
        return {"experiment_key": self.version}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not self._given and self._experiment is None and state_dict.get("experiment_key"):
            self._key = str(state_dict["experiment_key"])
            self._goes_on = True

    def resume(self, step: int) -> None:
        """Comet's SDK cannot tell what it has: steps that come again are sent again, with the same values."""
        self._goes_on = self._goes_on or step > 0 or self._run_key is not None
