"""How the ranks of a run end together: on SIGTERM with a checkpoint of the same step, on an error within seconds.

A strategy with several processes connects; then `watch(...)` goes around all that an entry point does:

    with watch(rank=place.rank, world=place.world_size, graceful=True) as stop:   # graceful: a fit
        ...
        if stop.begins(batch): ...                                                # failure.stop.GracefulStop
"""

from trainyard.failure.errors import PeerFailed, SIGTERMException, StopFailed
from trainyard.failure.stop import LAST, GracefulStop
from trainyard.failure.watch import Watch, watch

__all__ = ["LAST", "GracefulStop", "PeerFailed", "SIGTERMException", "StopFailed", "Watch", "watch"]
