"""From a user's DataLoader over a map-style dataset to batches at any position of any epoch."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from trainyard.data.feed import Feed
from trainyard.data.memory import Memory, pack, unpack
from trainyard.data.once import warn_once
from trainyard.data.order import Cursor, Drawn, Order, set_epoch
from trainyard.data.sampler import Batch, EpochPlan, rescaled, shifted
from trainyard.data.virtual import StepCursor, virtual_window
from trainyard.data.workers import Keyed, SeededDataset, WorkerInit, is_plain, remake
from trainyard.errors import MisconfigurationException
from trainyard.reproducibility import derived_seed, reseed_cpu

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

__all__ = ["Feed", "SampledFeed"]


class SampledFeed:
    """Each item of an epoch's order exactly once over all ranks, from any position, at any world size.

    An item is a sample; with a batch sampler of the user's, or with batch_size=None, a batch (`whole`). A sampler that
    divides itself among the ranks (`apart`) is followed by each rank on its own.
    """

    def __init__(
        self, loader: DataLoader[Any], plan: EpochPlan, order: Order, *, rank: int, world: int, seed: int,
        whole: bool = False, virtual: range | None = None,
    ) -> None:  # fmt: skip
        """`virtual`: the virtual ranks of this process; `plan.world` is then the number of all."""
        self.given, self.plan, self.order, self.seed = loader, plan, order, seed
        self._rank = rank if plan.world == world else 0
        self._virtual = virtual
        self._world = world
        self._scale = 1 if virtual is not None else world // plan.world
        """Of positions: a rank that is on its own speaks for all of them."""
        self._accumulate, self._origin = plan.accumulate, plan.origin
        self._whole = whole
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._collates = loader.batch_sampler is not None
        self._given: deque[tuple[Batch, list[Any], int]] = deque()
        self._asked = _Asked()
        self._loader: DataLoader[Any] | None = None
        if loader.num_workers or loader.pin_memory or not is_plain(loader):
            self._loader = self._remade(loader, rank)
        self._items: list[Any] = []
        self._digest = 0
        self._data_memory = Memory(loader.dataset)
        self._begun: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        self._epoch = -1
        self._used = False
        """Whether the epoch has given a batch."""

    def _remade(self, loader: DataLoader[Any], rank: int) -> DataLoader[Any]:
        import torch

        # A generator of its own: making an iterator draws from it, and must not move the global one.
        changes: dict[str, Any] = {"generator": torch.Generator()}
        changes["batch_sampler" if self._collates else "sampler"] = self._asked
        if loader.num_workers:
            changes["dataset"] = SeededDataset(loader.dataset)
            changes["worker_init_fn"] = WorkerInit(loader.worker_init_fn, rank)
            if not loader.in_order:
                warn_once("DataLoader(in_order=False) is ignored: the order must be known to go on from it")
        return remake(loader, **changes)

    # ---- how much

    @property
    def accumulate(self) -> int:
        return self._accumulate

    @accumulate.setter
    def accumulate(self, batches: int) -> None:
        self._accumulate = batches
        self._replan()

    @property
    def origin(self) -> int | None:
        return self._origin

    @origin.setter
    def origin(self, ranks: int | None) -> None:
        self._origin = ranks
        self._replan()

    def _replan(self) -> None:
        self.plan = self._planned(self._accumulate)

    def _planned(self, accumulate: int) -> EpochPlan:
        apart = self._scale > 1  # then it plans for a world of one
        return dataclasses.replace(
            self.plan, origin=None if apart else self._origin,
            accumulate=rescaled(accumulate, self._origin, self._world) if apart else accumulate,
        )  # fmt: skip

    def steps(self, accumulate: int) -> int | None:
        plan = self._planned(accumulate)
        if self.order.samples is not None:
            return plan.steps
        return None if plan.limit is None else -(-int(plan.limit) // accumulate)

    @property
    def scale(self) -> Fraction:
        return self.plan.scale

    @property
    def batches(self) -> int | None:
        return self.batches_from(0)

    def batches_from(self, used: int) -> int | None:
        if self.order.samples is not None:
            return self.plan.batches_from(used // self._scale)
        if self.plan.limit is None:
            return None
        most = int(self.plan.limit) * self.plan.counted
        return dataclasses.replace(self.plan, samples=most, limit=None).batches_from(used // self._scale)

    def position(self, batches: int) -> int:
        most = batches if self.order.samples is None else self.plan.usable
        return self._scale * min(self.plan.used_after(batches), most)

    # ---- batches

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        proof = self._restore(epoch, used)
        if used % self._scale:
            warn_once(_APART)
        own = used // self._scale
        set_epoch(self._dataset, epoch)
        cursor: Cursor = self.order.open(self.seed, epoch, own)
        if own and proof not in (None, cursor.digest):
            warn_once(_OTHER_ORDER.format(type(getattr(self.order, "sampler", None)).__name__))
        self._epoch, self._digest, self._used = epoch, cursor.digest, used > 0
        if self._virtual is not None:
            cursor = StepCursor(cursor)
        batches = self._batches(cursor, own)
        read = (
            self._read(cursor, batches, epoch)
            if self._loader is None
            else self._load(self._loader, cursor, batches, epoch, used)
        )
        return read if self._scale == 1 else self._scaled(read)

    def _batches(self, cursor: Cursor, used: int) -> Iterator[Batch]:
        plan = self.plan
        window = partial(self._window, plan)
        if self.order.samples is not None:
            yield from plan.in_steps(window, used)
            return
        # The length shows only at the end: a look at the indices behind the window tells whether it is the last one.
        end = None if plan.limit is None else int(plan.limit) * plan.counted
        beyond = plan.counted if plan.drop_last else 1
        while end is None or used < end:
            room = plan.step_samples
            room = room if end is None else min(room, end - used)
            found = cursor.ahead(room + beyond)
            size = min(found, room)
            size -= size % plan.counted if plan.drop_last else 0
            if not size:
                return
            ends = found < room + beyond or used + size == end
            yield from shifted(window(size), used, ends=ends)
            used += size
            if ends:
                return

    def _window(self, plan: EpochPlan, samples: int) -> list[Batch]:
        if self._virtual is None:
            return plan.window(self._rank, samples)
        return virtual_window(plan, self._virtual, samples)

    def _read(self, cursor: Cursor, batches: Iterator[Batch], epoch: int) -> Iterator[tuple[Batch, Any]]:
        """In this process: what DataLoader does without workers, without its 10 us a batch."""
        dataset, collate, whole, take = self._dataset, self._collate, self._whole, cursor.take
        fetch: Any = getattr(dataset, "__getitems__", None) if self._collates else dataset.__getitem__
        for batch in batches:
            self._items = items = take(batch)
            self._digest, self._used = cursor.digest, True
            wanted = items[0] if whole else items
            if batch.virtual is not None:  # as in a worker: what the process did before must not matter
                reseed_cpu(derived_seed("batch", self.seed, epoch, batch.positions.start))
            if fetch is not None:
                yield batch, collate(fetch(wanted))
            else:
                yield batch, collate([dataset[i] for i in wanted])

    def _load(
        self, loader: DataLoader[Any], cursor: Cursor, batches: Iterator[Batch], epoch: int, used: int
    ) -> Iterator[tuple[Batch, Any]]:
        self._given.clear()
        self._asked.batches = self.batches_from(used)
        self._asked.next = asking = self._ask(cursor, batches, epoch, seeded=loader.num_workers > 0)
        loader.generator.manual_seed(derived_seed("loader", self.seed, epoch, used))
        try:
            for data in loader:
                if not self._given:
                    raise MisconfigurationException(_OWN_WAY.format(type(loader).__name__))
                batch, self._items, self._digest = self._given.popleft()
                self._used = True
                yield batch, data
            if self._given:
                raise MisconfigurationException(_OWN_WAY.format(type(loader).__name__))
        finally:
            # No way back to here from the loader: workers whose end is the garbage collector's matter end late.
            asking.close()
            self._asked.next = iter(())

    def _ask(
        self, cursor: Cursor, batches: Iterator[Batch], epoch: int, *, seeded: bool
    ) -> Generator[Any, None, None]:
        for batch in batches:
            items = cursor.take(batch)
            self._given.append((batch, items, cursor.digest))
            wanted = items[0] if self._whole else items
            if seeded:
                yield Keyed(derived_seed("batch", self.seed, epoch, batch.positions.start), wanted)
            else:
                yield wanted

    def _scaled(self, read: Iterator[tuple[Batch, Any]]) -> Iterator[tuple[Batch, Any]]:
        for batch, data in read:
            yield batch._replace(start=batch.start * self._scale, size=batch.size * self._scale), data

    def indices(self, plan: Batch) -> list[Any]:
        if plan.padding:
            return []
        found = self._items[0] if self._whole else self._items
        return list(found) if isinstance(found, list | tuple) else [found]

    def close(self) -> None:
        if self._loader is not None:
            self._loader._iterator = None

    # ---- state

    def state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        state: dict[str, Any] = {}
        if isinstance(self.order, Drawn):
            state["order"] = {
                "epoch": self._epoch, "used": self._used, "digest": self._digest, "now": self.order.memory.state(),
            }  # fmt: skip
            if self._begun is not None:
                state["order"]["begun"] = self._begun
        if self._reads_here and _is_stateful(self._dataset):
            state["dataset"] = pack(self._dataset.state_dict())  # type: ignore[attr-defined]
        elif memory := self._data_memory.state():
            state["memory"] = memory
        return state

    def load_state(self, state: dict[str, Any], *, moved: bool = False) -> None:
        self._loaded = state

    def _restore(self, epoch: int, used: int) -> int | None:
        """Generators and counters as they were when the epoch began; the digest of the order up to the position."""
        state, self._loaded = self._loaded or {}, None
        if "dataset" in state and _is_stateful(self._dataset):
            self._dataset.load_state_dict(unpack(state["dataset"]))  # type: ignore[attr-defined]
        if "memory" in state:
            self._data_memory.load(state["memory"])
        if not isinstance(self.order, Drawn):
            return None
        kept, proof = state.get("order"), None
        if kept is not None:
            # From the start of an epoch that had gone on: it is iterated once more, as evaluation does.
            same = kept["epoch"] == epoch and (used > 0 or not kept["used"])
            self.order.memory.load(kept["begun"] if same else kept["now"])
            proof = kept["digest"] if same and not self.order.known else None
        self._begun = self.order.memory.state()
        return proof

    @property
    def _reads_here(self) -> bool:
        return self._loader is None or not self._loader.num_workers


class _Asked:
    """Sampler, or batch sampler, of the DataLoader: what to read next is decided when its iterator is made."""

    def __init__(self) -> None:
        self.next: Iterator[Any] = iter(())
        self.batches: int | None = None

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("the sampler has no length")
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        return self.next


def _is_stateful(found: Any) -> bool:
    return callable(getattr(found, "state_dict", None)) and callable(getattr(found, "load_state_dict", None))


_APART = (
    "the sampler divides itself among the ranks, and the number of ranks is another one since the last checkpoint: a few "
    "samples of this epoch are used twice, or not at all"
)
_OTHER_ORDER = (
    "{}: the sampler gave another order when it was run again to the position of the checkpoint, so the resume is not "
    "exact; let it draw from torch's, numpy's or python's generators, or keep a generator or an epoch's number as an "
    "attribute"
)
_OWN_WAY = (
    "{}: it does not give one batch for each that its batch sampler asks for, so its position is not known; say "
    "Trainer(use_distributed_sampler=False) to have it read as it is"
)
