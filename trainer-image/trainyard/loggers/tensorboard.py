"""TensorBoard event files in `<save_dir>/<name>/version_<n>[/<sub_dir>]`, and hparams.yaml."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.loggers import hparams_file
from trainyard.loggers.extras import require
from trainyard.loggers.folder import FolderLogger
from trainyard.loggers.graph import example_input, quiet_trace
from trainyard.loggers.ranks import rank_zero_experiment, rank_zero_only
from trainyard.loggers.values import add_prefix, as_dict, flatten, number, plain

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

HP_METRIC = "hp_metric"


class TensorBoardLogger(FolderLogger):
    """`lightning.pytorch.loggers.TensorBoardLogger`: same arguments, same files. Raises ModuleNotFoundError.

    `kwargs` go to `torch.utils.tensorboard.SummaryWriter`. A resumed fit writes into the same version, and marks the
    steps that come again with TensorBoard's own purge event, so that they are shown once.
    """

    NAME_HPARAMS_FILE = hparams_file.NAME

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, save_dir: str | Path, name: str | None = "lightning_logs", version: int | str | None = None,
        log_graph: bool = False, default_hp_metric: bool = True, prefix: str = "",
        sub_dir: str | Path | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        require("tensorboard", "tensorboard", "TensorBoardLogger")
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir = None if sub_dir is None else Path(os.path.expandvars(sub_dir)).expanduser()
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._kwargs = kwargs
        self._experiment: SummaryWriter | None = None
        self._again_from: int | None = None
        """Steps from here on are there from an earlier attempt, and to be purged."""
        self._goes_on = False
        """The files of an earlier attempt hold what came before."""
        self.hparams: dict[str, Any] = {}
        self._hparams_written: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}

    @property
    def sub_dir(self) -> str | None:
        return None if self._sub_dir is None else str(self._sub_dir)

    @property
    def log_dir(self) -> str:
        folder = self._version_folder()
        return str(folder if self._sub_dir is None else folder / self._sub_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        if self._experiment is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = {} if self._again_from is None else {"purge_step": self._again_from}
            self._experiment = SummaryWriter(log_dir=str(self._make_folder()), **{**purge, **self._kwargs})
            self._again_from = None
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers, tensors of one element, or dicts of them (one chart). Raises ValueError."""
        for name, value in add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR).items():
            if isinstance(value, Mapping):
                self.experiment.add_scalars(name, {k: number(v) for k, v in value.items()}, step)
                continue
            try:
                scalar = number(value)
            except ValueError as error:
                raise ValueError(f"{name}: TensorBoard can plot numbers only: {error}") from error
            self.experiment.add_scalar(name, scalar, step)

    @rank_zero_only
    def log_hyperparams(
        self, params: Any, metrics: Mapping[str, Any] | None = None, step: int | None = None
    ) -> None:
        """For hparams.yaml and the HPARAMS tab, which shows runs that have a metric: `metrics`, else "hp_metric" = -1
        unless `default_hp_metric` is False."""
        self.hparams.update(as_dict(params))
        if metrics is None and self._default_hp_metric:
            metrics = {HP_METRIC: -1}
            first = not self._goes_on
        else:
            first = True
        if not metrics:
            return
        if first:
            self.log_metrics(metrics, 0 if step is None else step)
        from torch.utils.tensorboard import summary

        shown = {name: plain(value) for name, value in flatten(as_dict(params)).items()}
        make: Any = summary.hparams
        writer: Any = self.experiment
        for part in make(shown, dict(metrics)):
            writer._get_file_writer().add_summary(part)

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """If the constructor got log_graph=True: of `input_array`, or the module's example_input_array."""
        if not self._log_graph:
            return
        sample = example_input(model, input_array, type(self).__name__)
        if sample is not None:
            with quiet_trace(model, sample) as (traced, args):
                self.experiment.add_graph(traced, args)

    @rank_zero_only
    def save(self) -> None:
        if self.hparams != self._hparams_written:
            hparams_file.write(self._make_folder(), self.hparams)
            self._hparams_written = dict(self.hparams)
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The writer's thread ends; a later use opens one more event file."""
        self.close()

    def close(self) -> None:
        self.save()
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    def _drop_from(self, step: int) -> None:
        if next(Path(self.log_dir).glob("*tfevents*"), None) is None:
            return
        self._goes_on = step > 0
        if self._experiment is None:
            self._again_from = step
            return
        writer: Any = self._experiment
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        writer._get_file_writer().add_event(event, step)
