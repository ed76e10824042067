"""Several training loaders at once: the feed of a list, a dict or a CombinedLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from trainyard.data.feed import Feed
from trainyard.data.sampler import Batch, rescaled

MODES = ("max_size_cycle", "max_size", "min_size", "sequential")
_CYCLE = 32


class CombinedFeed:
    """One batch of each part at a time, in the shape of the collection; with "sequential", one part after the other.

    `mode`: "min_size" ends with the shortest part, "max_size" with the longest (None stands for what has ended),
    "max_size_cycle" too (what has ended begins anew, in another order), as Lightning's do. All batches of an optimizer
    step count alike, because the parts' losses are added up by the module.
    """

    def __init__(
        self, given: Any, parts: Sequence[Feed], mode: str, rebuild: Callable[[list[Any]], Any], *, world: int,
        accumulate: int, limit: int | float | None,
    ) -> None:  # fmt: skip
        self.given, self.parts, self.mode, self.accumulate = given, list(parts), mode, accumulate
        self.origin: int | None = None
        self._rebuild, self._world = rebuild, world
        self._limit = limit
        self._number = 0
        self._epoch = -1
        self._places: list[tuple[int, int, bool]] = []
        """Of each part: how often it began anew, samples used since, whether it has come to its end once."""
        self._plans: list[Batch | None] = []
        self._loaded: dict[str, Any] | None = None

    # ---- how much

    @property
    def batches(self) -> int | None:
        return self._left([(0, 0, False)] * len(self.parts), 0)

    def steps(self, accumulate: int) -> int | None:
        step, batches = rescaled(accumulate, self.origin, self._world), self.batches
        return None if batches is None else -(-batches // step)

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

    def _left(self, places: list[tuple[int, int, bool]], number: int) -> int | None:
        """Batches until the epoch ends, None if unknown."""
        counts = [
            0 if done else part.batches_from(used)
            for part, (_, used, done) in zip(self.parts, places, strict=True)
        ]
        known = [count for count in counts if count is not None]
        if self.mode == "min_size":
            ends = [c for c, (_, _, done) in zip(counts, places, strict=True) if not done and c is not None]
            left = min(ends, default=None)
        elif len(known) < len(counts):
            left = None
        else:
            left = sum(known) if self.mode == "sequential" else max(known, default=0)
        if isinstance(self._limit, int):
            rest = max(0, self._limit - number)
            return rest if left is None else min(left, rest)
        if self._limit is not None and left is not None:
            return max(0, int((left + number) * self._limit) - number)
        return left

    # ---- batches

    def iterate(self, epoch: int, used: int) -> Iterator[tuple[Batch, Any]]:
        number = used // self._world
        self._restore(epoch, number)
        self._epoch, self._number = epoch, number
        left = self._left(self._places, number)
        ended = [done for _, _, done in self._places]
        over = left == 0 or (any(ended) if self.mode == "min_size" else all(ended))
        read = self._in_turn(epoch) if self.mode == "sequential" else self._together(epoch)
        read = iter(()) if over else read  # nothing must be read to find that out
        return self._planned(read, number, None if left is None else number + left)

    def _planned(
        self, read: Iterator[tuple[list[Batch | None], bool, Any]], number: int, end: int | None
    ) -> Iterator[tuple[Batch, Any]]:
        opened, world = number, self._world
        for plans, ends, data in read:
            if end is not None and number >= end:
                break
            last = ends or number + 1 == end
            size = self._step_batches if end is None else min(self._step_batches, end - opened)
            steps = last or number + 1 - opened == size
            self._advance(plans)
            padding = all(plan is None or plan.padding for plan in plans)
            # Ranks that have a sample of any part.
            ranks = max(min(world, plan.size) for plan in plans if plan is not None)
            number = self._number = number + 1
            weight = 0 if padding else Fraction(world, size * ranks)
            high = number - 1 if padding else number
            yield (
                Batch(
                    (number - 1) * world, world, number - 1, high, last, steps, 1 if weight == 1 else weight
                ),
                data,
            )
            if steps:
                opened = number
            if last:
                break

    def _together(self, epoch: int) -> Iterator[tuple[list[Batch | None], bool, Any]]:
        parts, mode = self.parts, self.mode
        cycles = [cycle for cycle, _, _ in self._places]
        ended = [done for _, _, done in self._places]
        running: list[Any] = [
            iter(()) if done and mode != "max_size_cycle" else part.iterate(_cycle(epoch, cycle), used)
            for part, (cycle, used, done) in zip(parts, self._places, strict=True)
        ]
        while True:
            found = []
            for n, part in enumerate(parts):
                one = next(running[n], None)
                if one is None and not ended[n]:  # not announced as the last batch
                    ended[n] = True
                    if all(ended) or mode == "min_size":
                        return
                if one is None and mode == "max_size_cycle":
                    cycles[n] += 1
                    self._places[n] = (cycles[n], 0, True)
                    running[n] = part.iterate(_cycle(epoch, cycles[n]), 0)
                    one = next(running[n], None)
                found.append(one or (None, None))
            plans = [plan for plan, _ in found]
            ended = [was or plan is None or plan.last for was, plan in zip(ended, plans, strict=True)]
            stop = any(ended) if mode == "min_size" else all(ended)
            yield plans, stop, self._rebuild([data for _, data in found])
            if stop:
                return

    def _in_turn(self, epoch: int) -> Iterator[tuple[list[Batch | None], bool, Any]]:
        for n, part in enumerate(self.parts):
            _, used, done = self._places[n]
            if done:
                continue
            plans: list[Batch | None] = [None] * len(self.parts)
            for plan, data in part.iterate(epoch, used):
                plans[n] = plan
                yield list(plans), plan.last and n + 1 == len(self.parts), data

    def _advance(self, plans: list[Batch | None]) -> None:
        for n, plan in enumerate(plans):
            if plan is not None:
                cycle, _, done = self._places[n]
                self._places[n] = (cycle, plan.end, done or plan.last)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    # ---- state

    def state(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        return {
            "epoch": self._epoch, "number": self._number, "places": [list(place) for place in self._places],
            "parts": [part.state() for part in self.parts],
        }  # fmt: skip

    def load_state(self, state: dict[str, Any], *, moved: bool = False) -> None:
        if not state:
            return
        self._loaded = state
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state(own, moved=moved)

    def _restore(self, epoch: int, number: int) -> None:
        state, self._loaded = self._loaded, None
        self._places = [(0, 0, False)] * len(self.parts)
        if state is not None and state["epoch"] == epoch and number:
            self._places = [(int(c), int(u), bool(d)) for c, u, d in state["places"]]
        elif number:
            self._places = self._counted(number)

    def _counted(self, number: int) -> list[tuple[int, int, bool]]:
        """Places after `number` batches, from the lengths alone."""
        places = []
        for part in self.parts:
            count = part.batches
            if self.mode == "sequential":
                own = number if count is None else min(number, count)
                number -= own
                places.append((0, part.position(own), count is not None and own == count))
            elif count is None or number <= count or self.mode != "max_size_cycle":
                own = number if count is None else min(number, count)
                places.append((0, part.position(own), count is not None and own == count))
            else:
                cycle, own = divmod(number, count)
                places.append((cycle, part.position(own), True))
        return places


def _cycle(epoch: int, cycle: int) -> int:
    """An epoch's number for what begins anew within an epoch."""
    return epoch + (cycle << _CYCLE)
