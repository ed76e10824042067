"""The profiler of those who want none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.profilers.profiler import Profiler

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


class PassThroughProfiler(Profiler):
    """`lightning.pytorch.profilers.PassThroughProfiler`: for modules that say `self.trainer.profiler.profile(...)`."""

    def attach(self, trainer: Trainer, stage: str) -> None: ...
    def start(self, action_name: str) -> None: ...
    def stop(self, action_name: str) -> None: ...
