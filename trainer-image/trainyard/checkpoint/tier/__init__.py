"""The fast tier: the newest checkpoint on the nodes themselves, and copies on their neighbours.

Nothing here is needed: whatever goes wrong is a warning, what is found is verified as the bucket's is, and the bucket has
it all. `open_tier` is the worker's side; the uploader's is `keeper`, `server` and `copies`.
"""

from __future__ import annotations

from trainyard.checkpoint.tier.worker import Tier, open_tier

__all__ = ["Tier", "open_tier"]
