"""A stop that nobody can ask for: what the loops have when there is no `failure.stop.GracefulStop`."""

from __future__ import annotations

import math
from typing import Any


class NoStop:
    """The loop's side of `failure.stop.GracefulStop`."""

    armed = False
    requested_by = ""
    rescue: Any = None

    def seconds_left(self) -> float:
        return math.inf

    def announce(self, batch: int, inner: int = 0) -> None: ...

    def begins(self, batch: int, inner: int = 0) -> bool:
        return False
