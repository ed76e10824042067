"""The feed for what has no indices: iterable datasets, and loaders of any make."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from trainyard.data.memory import Memory
from trainyard.data.once import warn_once
from trainyard.data.reader import DATA, END, Item, Place, Reader
from trainyard.data.sampler import Batch, rescaled
from trainyard.reproducibility import OwnDraws, derived_seed, isolate_rng

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_DONE = object()


class StreamFeed:
    """Its position is a number of batches of each rank; the ranks have to divide the data themselves.

    A batch is fetched while the one before it is used, because only that shows which one is the last; unless the length
    is known (`exact`). What it draws is drawn from generators of its own, so that this changes nothing.
    """

    def __init__(
        self, given: Any, reader: Reader, loader: DataLoader[Any] | None, *, workers: int, length: int | None,
        exact: bool, limit: int | None, world: int, accumulate: int, repeats: bool,
    ) -> None:  # fmt: skip
        self.given, self.accumulate = given, accumulate
        self.origin: int | None = None
        self._reader, self._loader, self._workers = reader, loader, workers
        self._world = world
        counts = [count for count in (length, limit) if count is not None]
        self.batches: int | None = min(counts, default=None)
        self._length, self._exact = length, exact
        self._end = self.batches if exact else limit
        self._repeats = repeats
        """It gives the same batches each time, for sure: a list."""
        self._memory = Memory(reader.dataset)
        self._draws: OwnDraws | None = None
        self._places: list[Place] = []
        self._turn = self._number = 0
        self._epoch = -1
        self._finished = False
        self._begun: dict[str, Any] = {}
        self._before: list[dict[str, Any]] = []
        self._after: list[dict[str, Any]] = []
        """What the workers' datasets remembered before and after the epoch."""
        self._loaded: tuple[dict[str, Any], bool] | None = None

    def steps(self, accumulate: int) -> int | None:
        step = rescaled(accumulate, self.origin, self._world)
        return None if self.batches is None else -(-self.batches // step)

    @property
    def scale(self) -> Fraction:
        return Fraction(self._step_batches, self.accumulate)

    @property
    def _step_batches(self) -> int:
        return rescaled(self.accumulate, self.origin, self._world)

    def batches_from(self, used: int) -> int | None:
        return None if self.batches is None else max(0, self.batches - used // self._world)

    def position(self, batches: int) -> int:
        return batches * self._world

    def indices(self, plan: Batch) -> list[Any]:
        return []

    # ---- batches

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        number, drop = used // self._world, 0
        if not self._restore(epoch, number) and number:
            drop = self._read_again(number)
        self._epoch, self._number, self._finished = epoch, number, False
        self._reader.begin(epoch, self._places, self._turn, self._before)
        items = self._from_workers(epoch, number) if self._workers else self._from_here()
        return self._planned(items, drop, number)

    def _read_again(self, number: int) -> int:
        """Without a state: how many batches are to be thrown away here. A single reader does it itself."""
        if not self._repeats:
            warn_once(_READS_AGAIN.format(type(self.given).__name__, number))
        if self._workers:
            return number
        self._places = [Place(given=number)]
        return 0

    def _planned(self, items: Iterator[Item], drop: int, number: int) -> Iterator[tuple[Batch, Any]]:
        for _ in range(drop):
            if (dropped := next(items, None)) is not None:
                self._take(dropped)
        opened, world, window = number, self._world, self._step_batches
        item = next(items, None) if self._end is None or number < self._end else None
        closes = self._exact and self._end == self._length
        while item is not None:
            following: Any = _DONE
            last = number + 1 == self._end
            if not last and not self._exact:
                following = next(items, None)
                last = following is None
            # A window that is cut short counts for what it has, if that is known when it begins.
            size = window if self._end is None else min(window, self._end - opened)
            steps = last or number + 1 - opened == size
            self._take(item)
            number = self._number = number + 1
            weight: Fraction | int = Fraction(1, size) if size > 1 else 1
            yield Batch((number - 1) * world, world, number - 1, number, last, steps, weight), item.data
            if steps:
                opened = number
            if last:
                item = None
            else:
                item = next(items, None) if following is _DONE else following
                if item is None:
                    warn_once(_SHORT.format(type(self.given).__name__, self.batches, number))
        if closes:
            next(items, None)  # what comes after the last batch in an iteration is part of it
        self._finished = True

    def _take(self, item: Item) -> None:
        place = self._places[item.worker]
        if item.state is not None:
            place = Place(item.given, item.state, item.given)
        self._places[item.worker] = place._replace(given=item.given)
        self._turn = (item.worker + 1) % max(1, self._workers)

    def _from_here(self) -> Iterator[Item]:
        items = iter(self._reader if self._loader is None else self._loader)
        if self._repeats:
            yield from items
            return
        if self._draws is None:
            with isolate_rng():
                self._draws = OwnDraws(0)
        while True:
            with self._draws:
                item = next(items, None)
            if item is None:
                return
            yield item

    def _from_workers(self, epoch: int, number: int) -> Iterator[Item]:
        loader: Any = self._loader
        ended = set()
        loader.generator.manual_seed(derived_seed("loader", epoch, number))
        self._after = [{} for _ in range(self._workers)]
        for item in loader:
            if item.kind == DATA:
                yield item
            elif item.kind == END:
                ended.add(item.worker)
                self._after[item.worker] = item.state
                if len(ended) == self._workers:
                    return

    def close(self) -> None:
        if self._loader is not None:
            self._loader._iterator = None

    # ---- state

    def state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded[0]
        places = self._places
        if not self._workers and self._exact and places and not self._finished:
            kept = self._reader.capture()
            if kept is not None:
                places = [Place(self._number, kept, self._number)]
        return {
            "epoch": self._epoch, "number": self._number, "workers": self._workers, "turn": self._turn,
            "places": [list(place) for place in places], "finished": self._finished,
            "begun": self._begun, "now": self._memory.state(), "before": self._before, "after": self._after,
            "end": self._reader.capture() if self._finished and not self._workers else None,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any], *, moved: bool = False) -> None:
        self._loaded = state, moved

    def _restore(self, epoch: int, number: int) -> bool:
        """Whether the position is known."""
        count = max(1, self._workers)
        self._places, self._turn = [Place()] * count, 0
        state, moved = self._loaded or ({}, False)
        self._loaded = None
        if not state:
            self._before = self._after
            self._begun = self._memory.state()
            return False
        # From the start of an epoch that had gone on: it is iterated once more, as evaluation does.
        same = state["epoch"] == epoch and (number > 0 or not state["number"])
        if not same:
            self._memory.load(state["now"])
            self._reader.take_end(state["end"])
        else:
            self._memory.load(state["begun"])
        self._begun = self._memory.state()
        if moved or state["workers"] != self._workers:
            if number and not self._repeats:
                warn_once(_MOVED.format(type(self.given).__name__))
            return False
        self._before = state["before"] if same else state["after"]
        if not same or not number or not any(place[1] for place in state["places"]):
            known = same and bool(self._workers)  # each worker reads its own part again
            if known and number and not self._repeats:
                warn_once(_READS_AGAIN.format(type(self.given).__name__, number))
            if not known:
                return False
        self._places, self._turn = [Place(*place) for place in state["places"]], state["turn"]
        return True


_READS_AGAIN = (
    "{}: it has no state_dict, so the {} batches before the checkpoint's position are read again and thrown away. The "
    "resume is exact only if it gives the same batches each time, up to what it draws from the global generators"
)
_MOVED = (
    "{}: the number of ranks or of DataLoader workers is another one since the last checkpoint, and what only can be "
    "iterated cannot be divided anew: some samples of this epoch are used twice, or not at all"
)
_SHORT = (
    "{}: its length is {}, but it gave {} batches: the batches since the last optimizer step count for nothing; correct "
    "__len__"
)
