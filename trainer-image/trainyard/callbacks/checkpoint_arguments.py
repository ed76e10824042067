"""What may be asked of a ModelCheckpoint. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from trainyard.errors import MisconfigurationException


@dataclass(frozen=True, slots=True)
class Triggers:
    """When a checkpoint is due: one of the three, 0 or None for the others."""

    every_n_train_steps: int
    """Optimizer steps."""
    every_n_epochs: int
    train_time_interval: timedelta | None

    @classmethod
    def of(cls, steps: int | None, epochs: int | None, interval: timedelta | None) -> Triggers:
        """Each epoch if nothing is said. Raises MisconfigurationException for more than one, or for less than 0."""
        for name, value in (("every_n_train_steps", steps), ("every_n_epochs", epochs)):
            if value is not None and value < 0:
                raise MisconfigurationException(
                    f"ModelCheckpoint({name}={value}): less than 0; 0 switches it off"
                )
        if interval is not None and interval <= timedelta(0):
            raise MisconfigurationException(
                f"ModelCheckpoint(train_time_interval={interval!r}): is not positive"
            )
        if bool(steps) + bool(epochs) + (interval is not None) > 1:
            raise MisconfigurationException(
                "ModelCheckpoint: every_n_train_steps, every_n_epochs and train_time_interval exclude one another; give "
                "one, or use several ModelCheckpoints"
            )
        if steps is None and epochs is None and interval is None:
            epochs = 1
        return cls(steps or 0, epochs or 0, interval)


def check_arguments(*, monitor: str | None, mode: str, save_top_k: int, save_last: Any) -> None:
    """Raises MisconfigurationException."""
    if mode not in ("min", "max"):
        raise MisconfigurationException(f"ModelCheckpoint(mode={mode!r}): is neither 'min' nor 'max'")
    if save_top_k < -1:
        raise MisconfigurationException(
            f"ModelCheckpoint(save_top_k={save_top_k}): is less than -1 (all); 0 keeps none"
        )
    if monitor is None and save_top_k not in (-1, 0, 1):
        raise MisconfigurationException(
            f"ModelCheckpoint(save_top_k={save_top_k}): the best {save_top_k} of what? Give monitor, or one of -1, 0, 1"
        )
    if save_last not in (None, True, False, "link"):
        raise MisconfigurationException(
            f"ModelCheckpoint(save_last={save_last!r}): is none of True, False, 'link'"
        )
