"""What all profilers have in common."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


class Profiler(ABC):
    """`lightning.pytorch.profilers.Profiler`. Actions have names like Lightning's: "run_training_epoch",
    "[Strategy]DDPStrategy.training_step", "[LightningModule]Net.on_train_start", "[Callback]Timer.on_fit_end".

    With a `filename`, the report goes to `<dirpath>/<stage>-<filename>-<rank>.txt` of each local rank, `dirpath` being the
    Trainer's log_dir unless it is given; without one, rank 0 prints it.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str | None = None) -> None:
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.filename = filename
        self._stage: str | None = None
        self._local_rank: int | None = None
        self._global_rank = 0
        self._log_dir: str | None = None

    # ---- to be overridden

    @abstractmethod
    def start(self, action_name: str) -> None:
        """`action_name` begins."""

    @abstractmethod
    def stop(self, action_name: str) -> None:
        """`action_name` is over."""

    def summary(self) -> str:
        """The report; "" if there is nothing to say."""
        return ""

    # ---- what is done with it

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """The time of what happens inside."""
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def attach(self, trainer: Trainer, stage: str) -> None:
        """Ours: at the beginning of each entry point; the inverse is `teardown`."""
        self._global_rank = trainer.global_rank
        log_dir = None if self.dirpath is not None else trainer.log_dir
        self.setup(stage=stage, local_rank=trainer.local_rank, log_dir=log_dir)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """`stage` is "fit", "validate", "test" or "predict"."""
        self._stage, self._local_rank, self._log_dir = stage, local_rank, log_dir

    def describe(self) -> None:
        """Write the report, or print it."""
        report = self.summary()
        if not report:
            return
        if self.filename is not None:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report + "\n")
        elif self._global_rank == 0:
            print(report, flush=True)

    def teardown(self, stage: str | None) -> None:  # noqa: B027 - most have nothing open
        """Let go of what is open. The report stays."""

    @property
    def local_rank(self) -> int:
        return self._local_rank or 0

    # ---- for subclasses

    @property
    def folder(self) -> Path:
        return self.dirpath or Path(self._log_dir or ".")

    def _path(self, action: str = "", extension: str = ".txt") -> Path:
        parts = [
            self._stage,
            self.filename,
            _plain(action),
            None if self._local_rank is None else str(self._local_rank),
        ]
        return self.folder / ("-".join(part for part in parts if part) + extension)

    def _heading(self) -> str:
        return f"{self._stage.upper()} Profiler Report" if self._stage else "Profiler Report"


def _plain(action: str) -> str:
    """For a file name."""
    return re.sub(r"[^\w.\[\]=-]+", "_", action)
