"""How the ranks of a run end together: on SIGTERM with a checkpoint of the same step, on an error within seconds.

Around an entry point:

    with Watch(graceful=True) as watcher:             # a fit; around all that an entry point does, its clean-up included
        try:
            strategy.connect()
            stop = watcher.open(rank, world_size)
            ...
            if stop.begins(batch): ...                # failure.stop.GracefulStop
        except BaseException as error:
            watcher.failed(error)                     # first of all: tells the others, and bounds what follows
            ...                                       # on_exception
            raise
"""

from trainyard.failure.errors import PeerFailed, SIGTERMException, StopFailed
from trainyard.failure.stop import LAST, GracefulStop
from trainyard.failure.watch import Watch

__all__ = ["LAST", "GracefulStop", "PeerFailed", "SIGTERMException", "StopFailed", "Watch"]
