"""How one key of `self.log` is logged: Lightning's rules, which depend on where it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainyard.errors import MisconfigurationException

_STEP, _EPOCH = (True, False), (False, True)
_EVALUATIONS = ("validation", "test")
_DEFAULTS: dict[str, tuple[bool, bool]] = {
    **dict.fromkeys(
        ("training_step", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward",
         "on_after_backward", "on_before_optimizer_step", "backward", "optimizer_step", "optimizer_zero_grad",
         "configure_gradient_clipping", "clip_gradients", "lr_scheduler_step"), _STEP),
    **dict.fromkeys(("on_train_start", "on_train_epoch_start", "on_train_epoch_end"), _EPOCH),
    **{f"{stage}_step": _EPOCH for stage in _EVALUATIONS},
    **{
        f"on_{stage}_{moment}": _EPOCH
        for stage in _EVALUATIONS
        for moment in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end")
    },
}  # fmt: skip
"""(on_step, on_epoch) of `log` in each hook that may call it (Lightning's table)."""
_EPOCH_ONLY = frozenset(
    hook for hook in _DEFAULTS if hook.endswith(("_epoch_start", "_epoch_end")) or hook in
    ("on_train_start", "on_validation_start", "on_test_start")
)  # fmt: skip
REDUCTIONS = ("mean", "sum", "min", "max")


@dataclass(frozen=True, slots=True)
class Options:
    """The same at every call with one key."""

    hook: str
    on_step: bool
    on_epoch: bool
    prog_bar: bool
    logger: bool
    reduce: str
    sync: bool
    enable_graph: bool = False
    metric: str = ""
    """Path in the module of the torchmetrics object that is logged; empty for numbers."""
    group: Any = None
    """Process group of `sync`."""

    @classmethod
    def of(
        cls, hook: str | None, *, on_step: bool | None, on_epoch: bool | None, prog_bar: bool, logger: bool | None,
        reduce: str | Callable[..., Any], sync: bool, enable_graph: bool = False, metric: str = "", group: Any = None,
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
        return cls(
            hook,
            step,
            epoch,
            prog_bar,
            logger is not False,
            reduction(reduce),
            sync,
            enable_graph,
            metric,
            group,
        )


def reduction(given: str | Callable[..., Any]) -> str:
    """A name of REDUCTIONS for "mean", "avg", torch.mean, max, ... Raises MisconfigurationException."""
    name = given if isinstance(given, str) else getattr(given, "__name__", "?")
    name = {"avg": "mean", "amin": "min", "amax": "max"}.get(name, name)
    if name not in REDUCTIONS:
        raise MisconfigurationException(f"reduce_fx: {name!r} is none of {', '.join(REDUCTIONS)}")
    return name


def step_name(name: str, options: Options) -> str:
    """Key under which a step's value goes to loggers."""
    return f"{name}_step" if options.on_epoch else name


def epoch_name(name: str, options: Options) -> str:
    return f"{name}_epoch" if options.on_step else name
