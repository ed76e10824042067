"""`self.log`: what is logged where, and how it is reduced. Values stay on their device until a flush wants numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainyard.errors import MisconfigurationException

if TYPE_CHECKING:
    import torch

    from trainyard.strategies.base import Strategy

_STEP, _EPOCH = (True, False), (False, True)
_DEFAULTS: dict[str, tuple[bool, bool]] = {
    **dict.fromkeys(
        ("training_step", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward",
         "on_after_backward", "on_before_optimizer_step"), _STEP),
    **dict.fromkeys(
        ("validation_step", "on_validation_batch_start", "on_validation_batch_end", "on_train_start",
         "on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
         "on_validation_epoch_end"), _EPOCH),
}  # fmt: skip
"""(on_step, on_epoch) of `log` in each hook that may call it (Lightning's table)."""
_EPOCH_ONLY = {
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
    "on_validation_epoch_end",
}  # fmt: skip
REDUCTIONS = ("mean", "sum", "min", "max")


@dataclass(frozen=True, slots=True)
class Options:
    """How one key is logged; the same at every call."""

    hook: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    reduce: str
    sync: bool

    @classmethod
    def of(
        cls, hook: str | None, *, on_step: bool | None, on_epoch: bool | None, prog_bar: bool, logger: bool, reduce: str,
        sync: bool,
    ) -> Options:  # fmt: skip
        """Raises MisconfigurationException where Lightning's rules forbid it."""
        if hook not in _DEFAULTS:
            raise MisconfigurationException(
                f"self.log cannot be called from {hook or 'outside of the loops'}"
            )
        step, epoch = _DEFAULTS[hook]
        step, epoch = step if on_step is None else on_step, epoch if on_epoch is None else on_epoch
        if step and hook in _EPOCH_ONLY:
            raise MisconfigurationException(f"self.log(on_step=True) has no meaning in {hook}")
        if not step and not epoch:
            raise MisconfigurationException("self.log(on_step=False, on_epoch=False) would log nothing")
        if reduce not in REDUCTIONS:
            raise MisconfigurationException(f"reduce_fx: {reduce!r} is none of {', '.join(REDUCTIONS)}")
        return cls(hook, step, epoch, prog_bar, logger, reduce, sync)


@dataclass(slots=True)
class _Item:
    options: Options
    step_value: torch.Tensor
    total: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    fresh: bool = True
    """Logged since the last epoch-end reduction."""
    published: bool = False
    """`step_value` went out with a flush."""

    def update(self, value: torch.Tensor, weight: float) -> None:
        import torch

        self.step_value, self.fresh, self.published = value, True, False
        if not self.options.on_epoch or weight == 0:
            return
        value = value.to(_wide(value))
        if self.options.reduce in ("mean", "sum"):
            share = value * weight if self.options.reduce == "mean" else value
            self.total = share if self.total is None else self.total + share
            count = torch.full_like(value, weight)
            self.weight = count if self.weight is None else self.weight + count
        else:
            better = torch.minimum if self.options.reduce == "min" else torch.maximum
            self.total = value if self.total is None else better(self.total, value)


@dataclass(slots=True)
class Results:
    """All keys of one stage ("train" or "validate")."""

    items: dict[str, _Item] = field(default_factory=dict)

    def log(self, name: str, value: Any, options: Options, *, weight: float, device: torch.device) -> None:
        """Raises ValueError for what is no scalar, MisconfigurationException if `name` was logged otherwise before."""
        import torch

        if not isinstance(value, torch.Tensor):
            if not isinstance(value, bool | int | float):
                raise ValueError(  # noqa: TRY004 - Lightning's type for it
                    f"self.log({name!r}): a {type(value).__name__} is no number or one-element tensor"
                )
            value = torch.full((), float(value), device=device)  # a kernel; a copy would wait for the device
        elif value.numel() != 1:
            raise ValueError(f"self.log({name!r}): a tensor of shape {tuple(value.shape)} is no scalar")
        value = value.detach().reshape(())
        if not value.is_floating_point():
            value = value.float()
        known = self.items.get(name)
        if known is None:
            known = self.items[name] = _Item(options, value)
        elif known.options != options:
            raise MisconfigurationException(
                f"self.log({name!r}) is called twice with different arguments: {known.options} and {options}"
            )
        known.update(value, weight)

    def reset(self) -> None:
        self.items.clear()

    def step_values(self, strategy: Strategy) -> dict[str, tuple[Options, torch.Tensor]]:
        """Of the step that just ended, by key; synchronised ones in one message per kind of reduction."""
        chosen = {n: i for n, i in sorted(self.items.items()) if i.options.on_step}
        for item in chosen.values():
            item.published = True
        values = {n: i.step_value for n, i in chosen.items()}
        for reduce in REDUCTIONS:
            names = [n for n, i in chosen.items() if i.options.sync and i.options.reduce == reduce]
            values.update(_sync(strategy, {n: values[n] for n in names}, reduce))
        return {n: (i.options, values[n]) for n, i in chosen.items()}

    def epoch_values(self, strategy: Strategy) -> dict[str, tuple[Options, torch.Tensor]]:
        """Of the keys logged since the last call. Collective if any rank has a key with sync_dist."""
        import torch

        fresh = {n: i for n, i in self.items.items() if i.options.on_epoch and i.fresh}
        for item in fresh.values():
            item.fresh = False
        totals = {n: i.total for n, i in fresh.items() if i.total is not None}
        weights = {n: i.weight for n, i in fresh.items() if i.weight is not None}
        # A rank may have had no batch at all, and so no key: all agree first on what there is.
        mine = {n: i.options.reduce for n, i in fresh.items() if i.options.sync}
        kinds: dict[str, str] = {}
        for theirs in strategy.peers.gather(mine):
            kinds.update(theirs)
        neutral = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}
        for reduce in REDUCTIONS:
            names = sorted(n for n, kind in kinds.items() if kind == reduce)
            if not names:
                continue
            blank = torch.tensor(neutral[reduce], device=strategy.device, dtype=_wide_on(strategy.device))
            totals.update(_sync(strategy, {n: totals.get(n, blank) for n in names}, _combine(reduce)))
            if reduce == "mean":
                weights.update(_sync(strategy, {n: weights.get(n, blank) for n in names}, "sum"))
        out = {}
        for name, item in fresh.items():
            if name in totals:
                total = totals[name]
                value = total / weights[name] if item.options.reduce == "mean" else total
                out[name] = (item.options, value.float())
        return out

    def state_dict(self) -> dict[str, Any]:
        """The sums of an epoch that is under way."""
        keys = ("hook", "on_step", "on_epoch", "prog_bar", "logger", "reduce", "sync")
        return {
            name: {
                "options": {k: getattr(item.options, k) for k in keys},
                "step_value": item.step_value, "total": item.total, "weight": item.weight,
            }
            for name, item in self.items.items()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        self.items = {
            name: _Item(
                Options(**saved["options"]),
                saved["step_value"].to(device),
                moved(saved["total"]),
                moved(saved["weight"]),
            )
            for name, saved in state.items()
        }


def step_names(name: str, options: Options) -> str:
    """Key under which a step's value goes to loggers."""
    return f"{name}_step" if options.on_epoch else name


def epoch_names(name: str, options: Options) -> str:
    return f"{name}_epoch" if options.on_step else name


def to_floats(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """With one transfer from the device for all."""
    import torch

    if not tensors:
        return {}
    return dict(zip(tensors, torch.stack([t.float() for t in tensors.values()]).tolist(), strict=True))


def _combine(reduce: str) -> str:
    return "sum" if reduce == "mean" else reduce


def _sync(strategy: Strategy, values: dict[str, torch.Tensor], reduce: str) -> dict[str, torch.Tensor]:
    import torch

    if not values:
        return {}
    packed = strategy.reduce(torch.stack([v.to(_wide(v)) for v in values.values()]), reduce)
    return dict(zip(values, packed.unbind(), strict=True))


def _wide(value: torch.Tensor) -> torch.dtype:
    return _wide_on(value.device)


def _wide_on(device: torch.device) -> torch.dtype:
    import torch

    return torch.float32 if device.type == "mps" else torch.float64
