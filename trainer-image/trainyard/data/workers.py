"""What happens in DataLoader workers, and how a user's DataLoader is made again around it."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainyard.failure.ending import grace_seconds
from trainyard.reproducibility import SEED_ENV, WORKERS_ENV, derived_seed, reseed_cpu

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class Keyed(NamedTuple):
    """What a DataLoader passes to its worker for one batch."""

    seed: int
    """Of the batch's random transforms."""
    items: Any
    """A list of indices, or one index where nothing is collated."""


class SeededDataset:
    """What random transforms do to a batch depends on (seed, epoch, position) alone, not on what the worker did before.
    So a resumed run gets the very same batches, with any number of workers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keyed: Keyed) -> list[Any]:
        reseed_cpu(keyed.seed)
        if callable(fetch := getattr(self.dataset, "__getitems__", None)):
            return fetch(keyed.items)  # type: ignore[no-any-return]
        return [self.dataset[i] for i in keyed.items]

    def __getitem__(self, keyed: Keyed) -> Any:
        reseed_cpu(keyed.seed)
        return self.dataset[keyed.items]


def _end_later(*_: object) -> None:
    """On SIGTERM, which is also what Python sends its children at its own end, and then waits for them."""
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, grace_seconds())


@dataclass(frozen=True, slots=True)
class WorkerInit:
    """First thing in each DataLoader worker. The user's function sees the user's dataset."""

    then: Callable[[int], None] | None
    rank: int

    def __call__(self, worker: int) -> None:
        from torch.utils.data import get_worker_info

        # The process that owns the workers decides about their end. A signal to the whole group must not take the
        # batches away that are needed for the last steps before a save; but a worker that was left behind must end.
        signal.signal(signal.SIGTERM, _end_later)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if os.environ.get(WORKERS_ENV) == "1":
            reseed_cpu(derived_seed("worker", os.environ.get(SEED_ENV, "0"), self.rank, worker))
        info = get_worker_info()
        if info is not None:
            object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[attr-defined]
        if self.then is not None:
            self.then(worker)


def is_plain(loader: DataLoader[Any]) -> bool:
    """Whether it reads as torch's own DataLoader does, or torchdata's stateful one, so that we may read in its place."""
    from torch.utils.data import DataLoader

    kind = type(loader)
    return kind is DataLoader or (
        kind.__name__ == "StatefulDataLoader" and kind.__module__.partition(".")[0] == "torchdata"
    )


def remake(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """`loader` with other attributes: all that we do not know of (of its own class, of newer versions of torch) is kept.

    A subclass is not constructed again, which would need its arguments, but copied.
    """
    from torch.utils.data import DataLoader

    made: DataLoader[Any] = DataLoader.__new__(DataLoader) if is_plain(loader) else copy.copy(loader)
    # DataLoader.__setattr__ refuses some of them after construction.
    made.__dict__.update(loader.__dict__)
    made.__dict__.update(changes, _iterator=None, in_order=True)
    return made
