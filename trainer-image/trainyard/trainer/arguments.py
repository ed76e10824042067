"""The Trainer's arguments: which there are, what the environment says of them, and what their values may be."""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from trainyard.errors import MisconfigurationException

_log = logging.getLogger("trainyard")

ENV_PREFIX = "PL_TRAINER_"
_NO_EFFECT: dict[str, Any] = {"model_registry": None, "suggest_integrations": True}
"""Known from Lightning, accepted, and without effect here."""
_BAREBONES: dict[str, Any] = {
    "enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 0,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "fast_dev_run": False, "detect_anomaly": False,
    "profiler": None,
}  # fmt: skip
"""What Trainer(barebones=True) stands for, and so cannot be combined with."""


def from_environment(
    given: Mapping[str, Any], signature: Callable[..., Any], env: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """`given`, and for what was left out the value of PL_TRAINER_<NAME>. Raises TypeError for an unknown name."""
    parameters = inspect.signature(signature).parameters
    known = [name for name in parameters if name != "self"]
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"Trainer has no argument {name!r}; the nearest is {nearest!r}")
    merged = dict(given)
    for name in known:
        text = env.get(ENV_PREFIX + name.upper())
        if text is not None and name not in given:
            merged[name] = _literal(text)
    return merged


def _literal(text: str) -> Any:
    """`ast.literal_eval` where it can, else the text itself: PL_TRAINER_MAX_EPOCHS=3, PL_TRAINER_STRATEGY=ddp."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with barebones' applied. Raises MisconfigurationException that names the argument."""
    checked = dict(values)
    for name, only in _NO_EFFECT.items():
        if values[name] != only:
            _log.warning("Trainer(%s=%r) has no effect in trainyard", name, values[name])
    if values["barebones"]:
        for name, value in _BAREBONES.items():
            if values[name] not in (None, value):
                raise MisconfigurationException(
                    f"{name}: {values[name]!r} and barebones=True, which switches it off: leave one of them out"
                )
            checked[name] = value
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        value = values[name]
        if value is not None and (not isinstance(value, int) or value < 1):
            raise MisconfigurationException(f"{name}: {value!r} is not a positive integer")
    if values["gradient_clip_algorithm"] not in (None, "norm", "value"):
        raise MisconfigurationException(
            f"gradient_clip_algorithm: {values['gradient_clip_algorithm']!r} is not 'norm' or 'value'"
        )
    clip = values["gradient_clip_val"]
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or clip < 0):
        raise MisconfigurationException(f"gradient_clip_val: {clip!r} is not a number of at least 0")
    if values["deterministic"] not in (None, True, False, "warn", "elastic"):
        raise MisconfigurationException(
            f"deterministic: {values['deterministic']!r} is not True, False, 'warn' or 'elastic'"
        )
    for name in ("max_epochs", "max_steps", "min_epochs", "min_steps"):
        value = values[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < -1):
            raise MisconfigurationException(f"{name}: {value!r} is not an integer of at least -1")
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        _check_share(name, values[name])
    _check_share("overfit_batches", values["overfit_batches"])
    reload = values["reload_dataloaders_every_n_epochs"]
    if not isinstance(reload, int) or reload < 0:
        raise MisconfigurationException(
            f"reload_dataloaders_every_n_epochs: {reload!r} is not an integer of at least 0"
        )
    if values["num_sanity_val_steps"] is not None and values["num_sanity_val_steps"] < -1:
        raise MisconfigurationException(
            f"num_sanity_val_steps: {values['num_sanity_val_steps']} is less than -1"
        )
    return checked


def _check_share(name: str, value: Any) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return
    raise MisconfigurationException(
        f"{name}: {value!r} is neither a number of batches (an int of at least 0) nor a fraction of them (0.0 to 1.0)"
    )
