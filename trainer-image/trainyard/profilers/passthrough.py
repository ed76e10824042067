"""The profiler of those who want none."""

from __future__ import annotations

from trainyard.profilers.profiler import Profiler


class PassThroughProfiler(Profiler):
    """`lightning.pytorch.profilers.PassThroughProfiler`: for modules that say `self.trainer.profiler.profile(...)`."""

    def start(self, action_name: str) -> None: ...
    def stop(self, action_name: str) -> None: ...
