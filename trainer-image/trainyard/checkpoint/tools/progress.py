"""How long work tells where it is. What is shown of it is the caller's business."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Of one piece of work. Called by several threads."""

    def begin(self, what: str, total: int) -> None:
        """`total`: bytes."""
        ...

    def advance(self, count: int) -> None: ...

    def end(self) -> None: ...


class Quiet:
    """Shows nothing."""

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def end(self) -> None: ...
