"""All keys of one stage, and their reduction over batches and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException
from trainyard.logged.item import Item, wide
from trainyard.logged.options import REDUCTIONS, Options

if TYPE_CHECKING:
    import torch

    from trainyard.strategies.base import Strategy

Values = dict[str, tuple[Options, "torch.Tensor"]]
"""By key, each a 0-dimensional tensor."""
_NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}


class Results:
    """Of "train", "validate" or "test"."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.known: dict[tuple[str, str | None, int | None], Item] = {}
        """By (name, hook, number of the loader) as they were given to `log`: found without any rule being looked up."""

    def make(self, options: Options, args: Any, metric: Any) -> Item:
        """An item of this kind of results."""
        return Item(options, args, metric)

    def add(self, key: str, item: Item) -> Item:
        """Raises MisconfigurationException if `key` was logged otherwise before."""
        before = self.items.get(key)
        if before is None:
            self.items[key] = item
            return item
        if before.options != item.options:
            raise MisconfigurationException(
                f"self.log({key!r}) is called twice with different arguments: {before.options} and {item.options}"
            )
        before.args = item.args
        before.metric = item.metric
        return before

    def reset(self) -> None:
        """The epoch is over: forget all, and have metrics do the same."""
        for item in self.items.values():
            if item.metric is not None:
                item.metric.reset()
        self.items.clear()
        self.known.clear()

    @property
    def has_steps(self) -> bool:
        return any(item.options.on_step for item in self.items.values())

    def step_values(self, strategy: Strategy) -> Values:
        """Of the step that just ended, by key; synchronised ones in one message per kind of reduction."""
        chosen: dict[str, Item] = {}
        values: dict[str, torch.Tensor] = {}
        for name, item in sorted(self.items.items()):
            if item.options.on_step and (value := item.step_value(strategy.device)) is not None:
                item.published = True
                chosen[name], values[name] = item, value
        for reduce in REDUCTIONS:
            synced = [n for n, i in chosen.items() if i.options.sync and i.options.reduce == reduce]
            values.update(_sync(strategy, {n: values[n] for n in synced}, reduce, self.items))
        return {n: (i.options, values[n]) for n, i in chosen.items()}

    def epoch_values(self, strategy: Strategy) -> Values:
        """Of the keys logged since the last call. Collective if any rank has a key with sync_dist."""
        import torch

        fresh = {n: i for n, i in self.items.items() if i.options.on_epoch and i.fresh}
        totals: dict[str, torch.Tensor] = {}
        weights: dict[str, torch.Tensor] = {}
        out: Values = {}
        for name, item in fresh.items():
            item.fresh = False
            if item.metric is not None:
                out[name] = (item.options, single(name, item.metric.compute()))
                continue
            total, weight = item.sums(strategy.device)
            if total is not None:
                totals[name] = total
                weights[name] = torch.full_like(total, weight)
        # A rank may have had no batch at all, and so no key: all agree first on what there is.
        mine = {n: i.options.reduce for n, i in fresh.items() if i.options.sync and i.metric is None}
        kinds: dict[str, str] = {}
        for theirs in strategy.peers.gather(mine):
            kinds.update(theirs)
        for reduce in REDUCTIONS:
            names = sorted(n for n, kind in kinds.items() if kind == reduce)
            blank = torch.tensor(_NEUTRAL[reduce], device=strategy.device, dtype=wide(strategy.device))
            combine = "sum" if reduce == "mean" else reduce
            totals.update(_sync(strategy, {n: totals.get(n, blank) for n in names}, combine, self.items))
            if reduce == "mean":
                weights.update(_sync(strategy, {n: weights.get(n, blank) for n in names}, "sum", self.items))
        for name, item in fresh.items():
            if name in totals:
                mean = item.options.reduce == "mean"
                value = totals[name] / weights[name] if mean else totals[name]
                out[name] = (item.options, value.float())
        return {name: out[name] for name in fresh if name in out}

    def state_dict(self) -> dict[str, Any]:
        """The sums of an epoch that is under way."""
        return {name: item.state_dict() for name, item in self.items.items() if item.metric is None}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.known.clear()
        self.items = {
            name: Item.from_state(saved, device)
            for name, saved in state.items()
            if "exact" not in saved  # of a run with virtual ranks: they begin anew
        }


def to_floats(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """With one transfer from the device for all."""
    import torch

    if not tensors:
        return {}
    flat = torch.stack([t.detach().float() for t in tensors.values()])
    return dict(zip(tensors, flat.tolist(), strict=True))


def _sync(
    strategy: Strategy, values: dict[str, torch.Tensor], reduce: str, items: dict[str, Item]
) -> dict[str, torch.Tensor]:
    """In one message for each process group."""
    import torch

    out: dict[str, torch.Tensor] = {}
    groups: dict[int, list[str]] = {}
    for name in values:
        groups.setdefault(id(items[name].options.group) if name in items else id(None), []).append(name)
    for names in groups.values():
        group = items[names[0]].options.group if names[0] in items else None
        dtype = wide(strategy.device)
        packed = torch.stack([values[n].detach().to(strategy.device, dtype) for n in names])
        out.update(zip(names, strategy.reduce_values(packed, reduce, group).unbind(), strict=True))
    return out


def single(name: str, value: Any) -> torch.Tensor:
    """What a metric computed. Raises ValueError for more than one number."""
    import torch

    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ValueError(
            f"self.log({name!r}): the metric's compute() gave no single number, but {type(value).__name__}"
        )
    return value.detach().float().reshape(())
