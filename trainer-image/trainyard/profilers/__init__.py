"""Where the time of a training goes. Without a profiler nothing of this is called."""

from trainyard.profilers.advanced import AdvancedProfiler
from trainyard.profilers.choice import make_profiler
from trainyard.profilers.passthrough import PassThroughProfiler
from trainyard.profilers.profiler import Profiler
from trainyard.profilers.pytorch import PyTorchProfiler
from trainyard.profilers.simple import SimpleProfiler

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "make_profiler",
]
