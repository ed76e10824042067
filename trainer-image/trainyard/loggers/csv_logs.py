"""A CSV file with one row per flush: `<save_dir>/<name>/version_<n>/metrics.csv`, and hparams.yaml beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.loggers import hparams_file
from trainyard.loggers.folder import FolderLogger
from trainyard.loggers.ranks import rank_zero_experiment, rank_zero_only
from trainyard.loggers.values import add_prefix, as_dict, number


class ExperimentWriter:
    """The file. Rows wait in `metrics` until `save`; a new column makes it write the file anew. Raises OSError."""

    NAME_METRICS_FILE = "metrics.csv"
    NAME_HPARAMS_FILE = hparams_file.NAME

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = str(log_dir)
        self.metrics: list[dict[str, float]] = []
        self.hparams: dict[str, Any] = {}
        self.metrics_file_path = str(Path(log_dir) / self.NAME_METRICS_FILE)
        self._columns: list[str] | None = None
        """Of the file; None until it is looked at."""
        self._hparams_written: dict[str, Any] = {}

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        self.hparams.update(params)

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Values with one element. Raises ValueError."""
        row = {name: number(value) for name, value in metrics_dict.items()}
        self.metrics.append({**row, "step": len(self.metrics) if step is None else step})

    def save(self) -> None:
        if self.hparams != self._hparams_written:
            hparams_file.write(self.log_dir, self.hparams)
            self._hparams_written = dict(self.hparams)
        if not self.metrics:
            return
        if self._columns is None:
            self.keep(None)
        written = self._columns or []
        columns = sorted({name for row in self.metrics for name in row} | set(written))
        if columns == written:
            with Path(self.metrics_file_path).open("a", newline="") as file:
                file.write(_text(columns, self.metrics, header=False))
        else:
            self._write(columns, [*self._read(), *self.metrics])
        self.metrics = []

    def keep(self, before: int | None) -> None:
        """Take over the file of an earlier process: without rows of steps >= `before`, and without a line that a kill
        has cut off."""
        self.metrics = [row for row in self.metrics if before is None or row["step"] < before]
        path = Path(self.metrics_file_path)
        if not path.exists():
            self._columns = []
            return
        text = path.read_text()
        rows = self._read()
        kept = [row for row in rows if before is None or float(row["step"]) < before]
        self._columns = next(csv.reader(io.StringIO(text)), []) if text.endswith("\n") or rows else []
        if len(kept) != len(rows) or not text.endswith("\n"):
            self._write(self._columns, kept)

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines only."""
        path = Path(self.metrics_file_path)
        text = path.read_text() if path.exists() else ""
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))

    def _write(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        path = Path(self.metrics_file_path)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(_text(columns, rows, header=True), newline="")
        temporary.replace(path)
        self._columns = columns


def _text(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns)
    if header and columns:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


class CSVLogger(FolderLogger):
    """`lightning.pytorch.loggers.CSVLogger`: same arguments, same files. Methods raise OSError when they cannot write.

    A version that is there already is added to; a fit drops those of its rows that it logs again.
    """

    def __init__(
        self, save_dir: str | Path, name: str | None = "lightning_logs", version: int | str | None = None,
        prefix: str = "", flush_logs_every_n_steps: int = 100,
    ) -> None:  # fmt: skip
        super().__init__(save_dir, name, version, prefix)
        self._every = max(1, flush_logs_every_n_steps)
        self._experiment: ExperimentWriter | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = ExperimentWriter(self._make_folder())
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log_metrics(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR), step)
        if step is not None and (step + 1) % self._every == 0:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Mapping, Namespace or dataclass."""
        self.experiment.log_hparams(as_dict(params))

    @rank_zero_only
    def save(self) -> None:
        if self._experiment is not None:
            self._experiment.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def close(self) -> None:
        self.save()
        self._experiment = None

    def _drop_from(self, step: int) -> None:
        self.experiment.keep(step)
