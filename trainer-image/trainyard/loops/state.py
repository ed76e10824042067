"""Where a fit is. Together with what learns, it is all that a resume needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trainyard.data.batching import Batching
from trainyard_api.checkpoints import Cursor


@dataclass(slots=True)
class LoopState:
    """Bit-identical resume means: this, the weights, the optimizers', schedulers' and callbacks' states, and each rank's
    generators, all taken at one point between two steps, lead to the same weights as if nothing had happened."""

    epoch: int = 0
    """Epochs completed."""
    samples: int = 0
    """Of this epoch already used, over all ranks."""
    batches: int = 0
    """Of this epoch already used."""
    step: int = 0
    """Optimizer steps since the start of the run (with manual optimization, of all optimizers)."""
    seed: int = 0
    """Of the data order."""
    total_batches: int = 0
    """Used since the start of the run."""
    stepped: int = 0
    """Batches since the start of the run after which an optimizer stepped: what the loggers count by."""
    validates: bool = False
    """A validation is due before the next batch: it was abandoned for a save on the way out."""
    validated: bool = False
    """The validation that falls on this position has been: a file that it saved does not have it done twice."""
    batching: Batching | None = None
    """What a global batch is; None before there is training data."""

    @property
    def cursor(self) -> Cursor:
        return Cursor(epoch=self.epoch, samples=self.samples, seed=self.seed)

    @property
    def mid_epoch(self) -> bool:
        return self.samples > 0

    def next_epoch(self) -> None:
        self.epoch += 1
        self.samples = self.batches = 0
        self.validated = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LoopState:
        batching = state.get("batching")
        known: dict[str, Any] = {
            k: int(v) for k, v in state.items() if k in cls.__dataclass_fields__ and k != "batching"
        }
        for flag in ("validates", "validated"):
            known[flag] = bool(known.get(flag, False))
        return cls(**known, batching=None if batching is None else Batching.from_state(batching))
