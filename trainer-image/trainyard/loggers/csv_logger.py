"""A CSV file with one row per flush: `<save_dir>/<name>/version_<n>/metrics.csv`."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.loggers.base import Logger


class CSVLogger(Logger):
    """`lightning.pytorch.loggers.CSVLogger`: same arguments, same file. Raises OSError if it cannot write."""

    def __init__(
        self, save_dir: str | Path, name: str | None = "lightning_logs", version: int | str | None = None,
        prefix: str = "", flush_logs_every_n_steps: int = 100,
    ) -> None:  # fmt: skip
        self._save_dir = Path(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = f"{prefix}-" if prefix else ""
        self._every = flush_logs_every_n_steps
        self._rows: list[dict[str, float]] = []
        self._written: list[str] = []
        """The columns of the file as it is."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        """The given one, else the first that is free."""
        if self._version is None:
            folder = self._save_dir / self._name
            taken = [
                int(m[1]) for p in folder.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", p.name))
            ]
            self._version = max(taken, default=-1) + 1
        return self._version

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def log_dir(self) -> str:
        version = self.version
        return str(
            self._save_dir / self._name / (version if isinstance(version, str) else f"version_{version}")
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {self._prefix + k: v for k, v in metrics.items()}
        self._rows.append({**row, "step": len(self._rows) if step is None else step})
        if step is not None and (step + 1) % self._every == 0:
            self.save()

    def save(self) -> None:
        if not self._rows:
            return
        path = Path(self.log_dir) / "metrics.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = sorted({k for row in self._rows for k in row} | set(self._written))
        rows: list[dict[str, Any]] = list(self._rows)
        if self._written and columns != self._written:
            with path.open(newline="") as file:
                rows = [*csv.DictReader(file), *rows]
        fresh = columns != self._written
        with path.open("w" if fresh else "a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)
        self._rows, self._written = [], columns

    def finalize(self, status: str) -> None:
        self.save()
