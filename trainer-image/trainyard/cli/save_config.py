"""The configuration of a run, beside what it logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.callbacks.base import Callback
from trainyard.utilities.yaml import dump

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer


class SaveConfigCallback(Callback):
    """Writes `config.yaml` into the trainer's log_dir when a fit begins. A run that goes on writes nothing if its
    configuration is the one that is there, else `config-1.yaml` and so on, unless `overwrite`."""

    def __init__(  # noqa: PLR0917 - Lightning's signature
        self, parser: Any, config: Mapping[str, Any], config_filename: str = "config.yaml", overwrite: bool = False,
        multifile: bool = False, save_to_log_dir: bool = True,
    ) -> None:  # fmt: skip
        self.parser, self.config = parser, config
        self.config_filename, self.overwrite, self.save_to_log_dir = (
            config_filename,
            overwrite,
            save_to_log_dir,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        log_dir = trainer.log_dir  # collective
        if not trainer.is_global_zero:
            return
        if self.save_to_log_dir and log_dir is not None and "://" not in str(log_dir):
            self._write(Path(log_dir))
        self.save_config(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """To be overridden: on rank 0, where else it is to be kept."""

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, text, number = folder / self.config_filename, dump(dict(self.config)), 0
        while path.exists() and not self.overwrite:
            if path.read_text(encoding="utf-8") == text:
                return
            number += 1
            base = Path(self.config_filename)
            path = folder / f"{base.stem}-{number}{base.suffix}"
        path.write_text(text, encoding="utf-8")
