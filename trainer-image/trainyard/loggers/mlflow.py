"""MLflow, through its client (not its global "active run", so that a script's own runs are left alone)."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainyard.errors import MisconfigurationException
from trainyard.loggers import hparams_file
from trainyard.loggers.base import Logger
from trainyard.loggers.checkpoints import LogModel, SavedModel, Uploads
from trainyard.loggers.deadline import CALL_SECONDS, CONNECT_SECONDS, FAILED_SECONDS, bounded
from trainyard.loggers.extras import require
from trainyard.loggers.identity import run_key
from trainyard.loggers.ranks import is_rank_zero, rank_zero_experiment, rank_zero_only
from trainyard.loggers.values import add_prefix, as_dict, flatten, jsonable, number, plain

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

    from trainyard.callbacks.model_checkpoint import ModelCheckpoint

_log = logging.getLogger("trainyard")
_T = TypeVar("_T")

RUN_TAG = "trainyard.run"
"""By which the next attempt of a TrainingRun finds its MLflow run."""
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
"""The server's limits: https://mlflow.org/docs/latest/api_reference/rest-api.html#log-batch ."""
_BACKLOG = 50_000
"""Metrics that wait for a server which is away; after that the oldest are dropped."""
_PAUSE_SECONDS = 30.0
"""Between two tries then."""
_UPLOAD_SECONDS = 600.0
"""For a checkpoint."""
_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "finished": "FINISHED"}


class MLFlowLogger(Logger):
    """`lightning.pytorch.loggers.MLFlowLogger`: same arguments. Raises ModuleNotFoundError.

    Without `tracking_uri` and MLFLOW_TRACKING_URI it is a database, `sqlite:///<save_dir>/mlflow.db`, with artifacts
    beside it: MLflow 3 refuses the folders of YAML files that Lightning writes there. `synchronous=False` sends
    metrics from MLflow's own threads.
    """

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, experiment_name: str = "lightning_logs", run_name: str | None = None,
        tracking_uri: str | None = None, tags: Mapping[str, Any] | None = None, save_dir: str | Path | None = "./mlruns",
        log_model: LogModel = False, prefix: str = "", artifact_location: str | None = None,
        run_id: str | None = None, synchronous: bool | None = None,
    ) -> None:  # fmt: skip
        require("mlflow", "mlflow", "MLFlowLogger")
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._folder = None if tracking_uri or save_dir is None else Path(save_dir).resolve()
        if tracking_uri is None and self._folder is None:
            raise MisconfigurationException("save_dir: give one, or a tracking_uri")
        self._tracking_uri = tracking_uri or f"sqlite:///{self._folder}/mlflow.db"
        self._remote = not self._tracking_uri.startswith(("sqlite:", "file:", "/", "."))
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tags = {str(k): str(v) for k, v in (tags or {}).items()}
        self._artifact_location = artifact_location
        self._prefix = prefix
        self._synchronous = synchronous
        self._uploads = Uploads(log_model)
        self._run_id = run_id
        self._given = run_id is not None
        self._experiment_id: str | None = None
        key = None if self._given else run_key("mlflow", self._tracking_uri, experiment_name, run_name)
        self._key = None if key is None else key[:32]
        self._client: MlflowClient | None = None
        self._waiting: deque[Metric] = deque(maxlen=_BACKLOG)
        self._next_try = 0.0
        self._goes_on = False
        self._known_to: dict[str, int] = {}
        """Newest step of each metric that the server has from an earlier attempt."""
        self._params: dict[str, str] = {}
        self._operations: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned: they go on with the same run."""
        return {**self.__dict__, "_client": None, "_operations": []}

    # ---- the run

    @property
    def name(self) -> str | None:
        """The experiment's id, as in Lightning."""
        return self.experiment_id

    @property
    def version(self) -> str | None:
        """The run's id, as in Lightning."""
        return self.run_id

    @property
    def save_dir(self) -> str | None:
        """Of the database, or of a file: URI; None when a server keeps everything."""
        if self._folder is not None:
            return str(self._folder)
        return self._tracking_uri.removeprefix("file:") if self._tracking_uri.startswith("file:") else None

    @property
    def experiment_id(self) -> str | None:
        """Asks the server at first, on rank 0; the other ranks know it through `load_state_dict`."""
        if is_rank_zero():
            self._connect()
        return self._experiment_id

    @property
    def run_id(self) -> str | None:
        if is_rank_zero():
            self._connect()
        return self._run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """Raises MlflowException, TimeoutError (30 s)."""
        return self._connect()

    def _connect(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        client, run = self._call(self._open, CONNECT_SECONDS)
        self._client, self._run_id, self._experiment_id = client, run.info.run_id, run.info.experiment_id
        self._params = dict(run.data.params)
        return client

    def _open(self) -> tuple[MlflowClient, Run]:
        from mlflow.entities import ViewType
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        client = MlflowClient(self._tracking_uri)
        if self._run_id is not None:
            client.update_run(self._run_id, status="RUNNING")
            return client, client.get_run(self._run_id)
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            experiment_id = found.experiment_id
        else:
            location = self._artifact_location or (
                None if self._folder is None else (self._folder / "artifacts").as_uri()
            )
            experiment_id = client.create_experiment(self._experiment_name, artifact_location=location)
        tags = dict(self._tags)
        if self._key is not None:
            query = f"tags.`{RUN_TAG}` = '{self._key}'"
            runs = client.search_runs(
                [experiment_id], query, run_view_type=ViewType.ACTIVE_ONLY, max_results=1
            )
            if runs:
                client.update_run(runs[0].info.run_id, status="RUNNING")
                return client, runs[0]
            tags[RUN_TAG] = self._key
        return client, client.create_run(experiment_id, tags=resolve_tags(tags), run_name=self._run_name)

    def _call(self, call: Callable[[], _T], seconds: float = CALL_SECONDS) -> _T:
        """A database file answers; a server may not, and MLflow would try for minutes."""
        return bounded(call, seconds, f"MLflow at {self._tracking_uri}") if self._remote else call()

    # ---- what is logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """In one call. If the server is away, they are kept and sent with a later flush."""
        from mlflow.entities import Metric

        self._connect()
        now = int(time.time() * 1000)
        for name, value in add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR).items():
            if isinstance(value, str):
                _log.warning("MLFlowLogger: the text %s=%r is no metric", name, value)
            else:
                self._waiting.append(Metric(_clean(name), number(value), now, 0 if step is None else step))
        self.save()

    def _last_step(self, key: str) -> int:
        """The earlier attempt's; MLflow would keep a step that comes again as a second value."""
        if not self._goes_on:
            return -1
        if key not in self._known_to:
            run_id = str(self.run_id)
            history = self._call(lambda: self.experiment.get_metric_history(run_id, key))
            self._known_to[key] = max((m.step for m in history), default=-1)
        return self._known_to[key]

    def _send(self) -> None:
        """A batch leaves the queue once the server has it; a repeated one is no harm: the store knows equal values."""
        client, run_id = self.experiment, str(self.run_id)
        while self._waiting:
            taken = [self._waiting[i] for i in range(min(_METRICS_PER_CALL, len(self._waiting)))]
            batch = [metric for metric in taken if metric.step > self._last_step(metric.key)]
            if batch and self._synchronous is False:
                self._operations.append(client.log_batch(run_id, metrics=batch, synchronous=False))
            elif batch:
                self._call(lambda batch=batch: client.log_batch(run_id, metrics=batch))  # type: ignore[misc]
            for _ in taken:
                self._waiting.popleft()
        self._next_try = 0.0

    @property
    def _away(self) -> bool:
        """The server did not answer lately."""
        return time.monotonic() < self._next_try

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nested names are joined with "/". MLflow never changes a parameter: one that has another value after a
        resume is left as it was, with a warning."""
        from mlflow.entities import Param

        client, run_id = self.experiment, str(self.run_id)
        new: dict[str, str] = {}
        for name, value in flatten(as_dict(params)).items():
            key, text = _clean(name), str(plain(value))[:_PARAM_LENGTH]
            if self._params.get(key, text) != text:
                _log.warning(
                    "MLFlowLogger: the run has %s=%s; MLflow cannot change that to %s",
                    key,
                    self._params[key],
                    text,
                )
            elif key not in self._params:
                new[key] = text
        for part in _parts([Param(k, v) for k, v in new.items()], _PARAMS_PER_CALL):
            self._call(lambda part=part: client.log_batch(run_id, params=part))  # type: ignore[misc]
        self._params.update(new)

    # ---- artifacts

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        models = self._uploads.now(checkpoint_callback)
        if self._away:
            return  # those that are still there will come with a later one
        for model in models:
            self._call(lambda model=model: self._upload(model), _UPLOAD_SECONDS)  # type: ignore[misc]

    def _upload(self, model: SavedModel) -> None:
        """`model/checkpoints/<name>/` with the file(s), metadata.yaml and aliases.txt, as Lightning lays it out."""
        client, run_id = self.experiment, str(self.run_id)
        target = f"model/checkpoints/{model.path.stem}"
        if model.path.is_dir():
            client.log_artifacts(run_id, str(model.path), f"{target}/{model.path.name}")
        else:
            client.log_artifact(run_id, str(model.path), target)
        with tempfile.TemporaryDirectory(prefix="trainyard-mlflow-") as folder:
            Path(folder, "metadata.yaml").write_text(hparams_file.to_yaml(jsonable(model.metadata)))
            Path(folder, "aliases.txt").write_text(str(list(model.aliases)))
            client.log_artifacts(run_id, folder, target)

    # ---- the end, and resume

    @rank_zero_only
    def save(self) -> None:
        """Sends what waits, unless the server has just been found away."""
        if self._client is None or not self._waiting or self._away:
            return
        try:
            self._send()
        except Exception as error:  # whatever it is: what is kept is tried again
            if not self._next_try:
                _log.warning("MLflow cannot be reached, metrics are kept and sent later: %s", error)
            self._next_try = time.monotonic() + _PAUSE_SECONDS

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Sends what waits, and sets the run's status."""
        if self._client is None:
            return
        client, run_id, failed = self._client, str(self._run_id), status != "success"
        if not failed:
            for model in self._uploads.at_end():
                self._call(lambda model=model: self._upload(model), _UPLOAD_SECONDS)  # type: ignore[misc]

        def end() -> None:
            self._send()
            for operation in self._operations:
                operation.wait()
            self._operations.clear()
            client.set_terminated(run_id, _STATUS.get(status, "FAILED"))

        self._call(end, FAILED_SECONDS if failed else CONNECT_SECONDS)

    def close(self) -> None:
        self.finalize("success")
        self._client = None

    def state_dict(self) -> dict[str, Any]:
        self.save()
        return {"run_id": self._run_id, "experiment_id": self._experiment_id}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if self._client is None and state_dict.get("run_id"):
            self._experiment_id = state_dict.get("experiment_id")
            if not self._given:
                self._run_id = state_dict["run_id"]

    def resume(self, step: int) -> None:
        """MLflow cannot take back what it has. What comes again is the same, so it is not sent a second time."""
        self._goes_on = step > 0 or (self._client is None and self._key is not None)
        self._known_to.clear()


def _clean(name: str) -> str:
    """MLflow's names have letters, digits and "_-. /" only (and ":" where the store runs on Linux)."""
    return re.sub(r"[^A-Za-z0-9_\-. /:]", "_", name)


def _parts(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
