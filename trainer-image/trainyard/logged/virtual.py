"""What virtual ranks log (`deterministic="elastic"`): the same numbers, bit for bit, on any number of processes.

All keys are reduced over all virtual ranks, whether they ask for it or not: a number that a scheduler or EarlyStopping
looks at must not depend on which process it belongs to. Sums are exact, so that nothing depends on their order. What is
logged outside of batches is taken from process 0 alone. torchmetrics objects reduce themselves, in their own way.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from trainyard.logged.exact import ExactSum, reduced
from trainyard.logged.item import Item, stack
from trainyard.logged.options import Options
from trainyard.logged.results import Results, Values, single

if TYPE_CHECKING:
    from trainyard.strategies.base import Strategy


class Where:
    """In which batch of which virtual rank `log` is called now. One of a `Metrics`."""

    __slots__ = ("first", "moment", "rank")

    def __init__(self, *, first: bool) -> None:
        self.first = first
        """Whether this is process 0."""
        self.rank: int | None = None
        """The virtual rank; None outside of batches."""
        self.moment = 0
        """Differs from step to step."""


class VirtualItem(Item):
    """Knows the newest value of each virtual rank, and exact sums."""

    __slots__ = ("_best", "_count", "_moment", "_newest", "_sum", "_where")

    def __init__(
        self, options: Options, args: Any = None, metric: Any = None, where: Where | None = None
    ) -> None:
        super().__init__(options, args, metric)
        self._where = where or Where(first=True)
        self._newest: dict[int, Any] = {}
        self._moment = -1
        self._sum, self._count = ExactSum(), Fraction(0)
        self._best = math.nan

    def update(self, name: str, value: Any, weight: float) -> None:
        where = self._where
        counts = where.rank is not None or where.first
        super().update(name, value, weight if counts else 0)
        if not counts:
            return
        if self._moment != where.moment:
            self._newest.clear()
            self._moment = where.moment
        newest = self.value if self.metric is None else getattr(self.metric, "_forward_cache", None)
        if newest is not None:
            self._newest[-1 if where.rank is None else where.rank] = newest

    def newest(self) -> dict[int, float]:
        """By virtual rank: what was logged in the last step in which something was."""
        values = stack(list(self._newest.values())).tolist() if self._newest else []
        return dict(zip(self._newest, values, strict=True))

    def _fold(self, device: torch.device | None = None) -> None:
        if not self._values:
            return
        values = stack(self._values).tolist()
        how = self.options.reduce
        if how in ("min", "max"):
            self._best = best([self._best, reduced(values, how)], how)
        for value, weight in zip(values, self._weights, strict=True):
            self._sum.add(value, weight if how == "mean" else 1)
            self._count += Fraction(weight)
        self._values, self._weights = [], []

    def totals(self) -> dict[str, Any]:
        """JSON: to be merged with others'."""
        self._fold()
        return {
            "sum": self._sum.to_state(),
            "count": str(self._count),
            "best": None if math.isnan(self._best) else self._best,
        }

    def merge(self, totals: dict[str, Any]) -> None:
        self._fold()
        self._sum.merge(ExactSum.from_state(totals["sum"]))
        self._count += Fraction(totals["count"])
        if totals["best"] is not None:
            self._best = best([self._best, totals["best"]], self.options.reduce)

    def total(self) -> float:
        """What was logged since the epoch began, reduced."""
        self._fold()
        how = self.options.reduce
        if how == "mean":
            return self._sum.over(self._count)
        return self._best if how in ("min", "max") else float(self._sum)

    def state_dict(self) -> dict[str, Any]:
        totals = self.totals()
        return {**super().state_dict(), "exact": totals}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> VirtualItem:
        item = cls(Options(**state["options"]))
        if state["value"] is not None:
            item.value = state["value"].to(device)
        item.merge(state["exact"])
        return item


class VirtualResults(Results):
    """Reductions are collective, and give the same keys and values on all processes."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self._where = where

    def make(self, options: Options, args: Any, metric: Any) -> Item:
        return VirtualItem(options, args, metric, self._where)

    def step_values(self, strategy: Strategy) -> Values:
        mine = {}
        for name, item in self._virtual_items():
            if item.options.on_step and not item.published and (newest := item.newest()):
                mine[name] = {"options": _plain(item.options), "newest": list(newest.items())}
                item.published = True
        out: Values = {}
        for name, parts in _by_key(strategy.peers.gather(mine)).items():
            options = self._known(name, parts[0]["options"])
            values = [value for part in parts for _, value in part["newest"]]
            out[name] = (options, _tensor(reduced(values, options.reduce), strategy))
        return out

    def epoch_values(self, strategy: Strategy) -> Values:
        fresh = {n: i for n, i in self._virtual_items() if i.options.on_epoch and i.fresh}
        out: Values = {}
        mine = {}
        for name, item in fresh.items():
            item.fresh = False
            if item.metric is not None:
                out[name] = (item.options, single(name, item.metric.compute()))
            else:
                mine[name] = {"options": _plain(item.options), "totals": item.totals()}
        for name, parts in _by_key(strategy.peers.gather(mine)).items():
            options = self._known(name, parts[0]["options"])
            whole = VirtualItem(options)
            for part in parts:
                whole.merge(part["totals"])
            out[name] = (options, _tensor(whole.total(), strategy))
        return out

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.known.clear()
        self.items = {}
        for name, saved in state.items():
            if "exact" not in saved:  # of a run without virtual ranks: they begin anew
                continue
            item = VirtualItem.from_state(saved, device)
            item._where = self._where
            self.items[name] = item

    def load_merged(self, states: list[dict[str, Any]], device: torch.device) -> None:
        """Of all ranks of another world size; process 0 takes all that they have summed up."""
        self.load_state_dict(states[0], device)
        for state in states[1:]:
            for name, saved in state.items():
                if "exact" not in saved:
                    continue
                item = self.items.setdefault(name, self.make(Options(**saved["options"]), None, None))
                assert isinstance(item, VirtualItem)  # noqa: S101 - as all that `make` has made
                item.merge(saved["exact"])

    def _virtual_items(self) -> list[tuple[str, VirtualItem]]:
        return [(name, item) for name, item in sorted(self.items.items()) if isinstance(item, VirtualItem)]

    def _known(self, name: str, options: dict[str, Any]) -> Options:
        """This process may have had no batch in which the key was logged."""
        item = self.items.get(name)
        return Options(**options) if item is None else item.options


def best(values: list[float], how: str) -> float:
    """The least or greatest of those that are there: NaN stands for none."""
    there = [value for value in values if not math.isnan(value)]
    return math.nan if not there else min(there) if how == "min" else max(there)


def _plain(options: Options) -> dict[str, Any]:
    found = asdict(options)
    del found["group"]
    return found


def _by_key(gathered: list[dict[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for of_rank in gathered:
        for name, part in of_rank.items():
            found.setdefault(name, []).append(part)
    return dict(sorted(found.items()))


def _tensor(value: float, strategy: Strategy) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=strategy.device)
