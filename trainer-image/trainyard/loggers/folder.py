"""What loggers that write files have in common: `<save_dir>/<name>/version_<n>`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainyard.errors import MisconfigurationException
from trainyard.loggers.base import Logger
from trainyard.loggers.identity import run_key

MARKER = ".trainyard-run"
"""Names the TrainingRun's logger that a version belongs to, so that its next attempt finds it without a checkpoint."""


class FolderLogger(Logger):
    """Raises MisconfigurationException for a `save_dir` that is no local path."""

    def __init__(
        self, save_dir: str | Path, name: str | None, version: int | str | None, prefix: str
    ) -> None:
        if "://" in str(save_dir):
            raise MisconfigurationException(
                f"save_dir: {save_dir} is a URL; {type(self).__name__} writes to local folders. Give it a path (of a volume, "
                "in a cluster), and keep the URL for checkpoints"
            )
        self._save_dir = Path(os.path.expandvars(save_dir)).expanduser()
        self._name = name or ""
        self._version = version
        self._given = version is not None
        self._prefix = prefix
        self._key = (
            None if self._given else run_key(type(self).__name__, os.path.normpath(save_dir), self._name)
        )
        self._used = False
        """This process has written something."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        """The given one, else this TrainingRun's, else the first that is free (a number). Rank 0 decides: the other
        ranks get it through `load_state_dict`."""
        if self._version is None:
            self._version = self._find_version()
        return self._version

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def root_dir(self) -> str:
        return str(self._save_dir / self._name)

    @property
    def log_dir(self) -> str:
        return str(self._version_folder())

    def _version_folder(self) -> Path:
        version = self.version
        return Path(self.root_dir) / (version if isinstance(version, str) else f"version_{version}")

    def _find_version(self) -> int:
        taken = []
        for path in Path(self.root_dir).glob("version_*"):
            if match := re.fullmatch(r"version_(\d+)", path.name):
                taken.append(int(match[1]))
                if self._key is not None and _marker(path) == self._key:
                    return taken[-1]
        return max(taken, default=-1) + 1

    def _make_folder(self) -> Path:
        """`log_dir`, there and marked. Raises OSError."""
        folder = self._version_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if self._key is not None and _marker(folder) != self._key:
            (folder / MARKER).write_text(self._key)
        self._used = True
        log_dir = Path(self.log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        return log_dir

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        self.save()
        return {"version": self.version}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not self._given and not self._used and state_dict.get("version") is not None:
            self._version = state_dict["version"]

    def resume(self, step: int) -> None:
        """A second fit from the beginning in the same process adds to the first, as in Lightning."""
        if (step or not self._used) and Path(self.log_dir).is_dir():
            self._drop_from(step)

    def _drop_from(self, step: int) -> None:
        """What the folder has of steps >= `step` comes again."""
        raise NotImplementedError


def _marker(folder: Path) -> str | None:
    try:
        return (folder / MARKER).read_text()
    except OSError:
        return None
