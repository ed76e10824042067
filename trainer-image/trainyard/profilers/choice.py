"""For Trainer(profiler=...)."""

from __future__ import annotations

from trainyard.errors import MisconfigurationException
from trainyard.profilers.advanced import AdvancedProfiler
from trainyard.profilers.passthrough import PassThroughProfiler
from trainyard.profilers.profiler import Profiler
from trainyard.profilers.pytorch import PyTorchProfiler
from trainyard.profilers.simple import SimpleProfiler

_KINDS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def make_profiler(given: str | Profiler | None) -> Profiler:
    """None: one that does nothing. Raises MisconfigurationException for what is no profiler."""
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, Profiler):
        return given
    kind = _KINDS.get(given.lower()) if isinstance(given, str) else None
    if kind is None:
        raise MisconfigurationException(
            f"profiler: {given!r} is none of {', '.join(map(repr, _KINDS))}, and no Profiler"
        )
    return kind()
