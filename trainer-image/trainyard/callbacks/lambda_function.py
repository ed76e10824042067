"""LambdaCallback: hooks given as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainyard.callbacks.base import Callback

_HOOKS = tuple(name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown"))


class LambdaCallback(Callback):
    """`lightning.pytorch.callbacks.LambdaCallback`: each keyword is a hook of Callback, with its arguments.

    Raises TypeError for what is no hook.
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, function in hooks.items():
            if name not in _HOOKS:
                raise TypeError(f"LambdaCallback: {name!r} is no hook; hooks are {', '.join(_HOOKS)}")
            if function is not None:
                setattr(self, name, function)
