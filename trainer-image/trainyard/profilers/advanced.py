"""Functions called within actions: cProfile, one profile for each action."""

from __future__ import annotations

import cProfile
import io
import pstats
from pathlib import Path

from trainyard.profilers.profiler import Profiler


class AdvancedProfiler(Profiler):
    """`lightning.pytorch.profilers.AdvancedProfiler`: what each action spends its time in, function by function.

    Python profiles one thing at a time. An action within an action is therefore recorded for itself, and its share is
    added to those around it when the report is made; a function that is under way when an inner action begins has only
    the time before that. `line_count_restriction`: how many functions of each action to list, an int or a fraction.
    `dump_stats`: also write a file for each action, for `pstats` or snakeviz. start raises ValueError for an action that
    is under way, stop for one that is not the innermost.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        line_count_restriction: float = 1.0,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath, filename)
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self._stack: tuple[str, ...] = ()
        self._profiles: dict[tuple[str, ...], cProfile.Profile] = {}
        """By the actions under way, outermost first."""

    def start(self, action_name: str) -> None:
        if action_name in self._stack:
            raise ValueError(f"profiler: {action_name!r} has started already")
        if self._stack:
            self._profiles[self._stack].disable()
        self._stack = (*self._stack, action_name)
        profile = self._profiles.get(self._stack)
        if profile is None:
            profile = self._profiles[self._stack] = cProfile.Profile()
        profile.enable()

    def stop(self, action_name: str) -> None:
        if not self._stack or self._stack[-1] != action_name:
            raise ValueError(f"profiler: {action_name!r} is not the action under way")
        self._profiles[self._stack].disable()
        self._stack = self._stack[:-1]
        if self._stack:
            self._profiles[self._stack].enable()

    @property
    def profiled_actions(self) -> dict[str, pstats.Stats]:
        """By action: its functions, with those of the actions within it."""
        found: dict[str, pstats.Stats] = {}
        for path, profile in self._profiles.items():
            profile.create_stats()
            if not profile.stats:
                continue
            for action in path:
                if action in found:
                    found[action].add(profile)
                else:
                    found[action] = pstats.Stats(profile)
        return found

    def summary(self) -> str:
        parts = [self._heading()]
        for action, stats in self.profiled_actions.items():
            text = io.StringIO()
            stats.stream = text  # type: ignore[attr-defined]
            stats.strip_dirs().sort_stats("cumulative").print_stats(self.line_count_restriction)
            parts.append(f"\nProfile stats for: {action}\n{text.getvalue().rstrip()}")
        return "\n".join(parts)

    def describe(self) -> None:
        if self.dump_stats:
            for action, stats in self.profiled_actions.items():
                path = self._path(action, ".prof")
                path.parent.mkdir(parents=True, exist_ok=True)
                stats.dump_stats(path)
        super().describe()

    def teardown(self, stage: str | None) -> None:
        """After an exception actions may be under way still."""
        if self._stack:
            self._profiles[self._stack].disable()
            self._stack = ()
