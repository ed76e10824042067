"""The kind of callback that writes checkpoints."""

from __future__ import annotations

from trainyard.callbacks.base import Callback


class Checkpoint(Callback):
    """`lightning.pytorch.callbacks.Checkpoint`: the Trainer puts these at the end of its callbacks, so that what they
    save holds what the others have done, and calls them last at the end of a training epoch."""
