"""Warnings that are said once in a process, and on rank 0 only."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("trainyard")
_said: set[str] = set()


def warn_once(message: str) -> None:
    """To the logger "trainyard"."""
    if message in _said:
        return
    _said.add(message)
    if int(os.environ.get("RANK", "0")) == 0:
        _log.warning("%s", message)
