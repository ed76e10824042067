"""What can be wrong with a `.ckpt` file. Each is also the type that Lightning, or Python, has for it."""

from __future__ import annotations

import pickle

from trainyard.checkpoint.errors import CheckpointConfigError


class CheckpointFileNotFound(CheckpointConfigError, FileNotFoundError):
    """There is no such file or object."""

    def __str__(self) -> str:  # FileNotFoundError's would look for errno and file name
        return str(self.args[0])


class CheckpointFileDamaged(CheckpointConfigError, RuntimeError):
    """The file is cut off, or no checkpoint at all."""


class UnsafeCheckpoint(CheckpointConfigError, pickle.UnpicklingError):
    """The file holds more than tensors and primitives, and nobody said weights_only=False."""


class WeightsOnlyCheckpoint(CheckpointConfigError, KeyError):
    """The file has weights and no optimizer, and a fit was to go on from it."""

    def __str__(self) -> str:  # KeyError's would quote it
        return str(self.args[0])
