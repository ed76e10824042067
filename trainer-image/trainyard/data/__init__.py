"""From a user's loaders to batches at any position of an epoch, whatever the world size; and to a server's input.

docs/library.md tells how loaders are followed. Names are imported when they are first used, so that importing this package
does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainyard.lazy import lazy_names

if TYPE_CHECKING:
    from trainyard.data.feed import Feed
    from trainyard.data.inference import predict_batches, prepare_batch
    from trainyard.data.make import make_feed
    from trainyard.data.sampler import Batch

_WHERE = {
    "Batch": "sampler",
    "Feed": "feed",
    "make_feed": "make",
    "predict_batches": "inference",
    "prepare_batch": "inference",
}

__all__ = ["Batch", "Feed", "make_feed", "predict_batches", "prepare_batch"]

__getattr__, __dir__ = lazy_names(__name__, _WHERE)
