"""Packages that the library makes use of when they are there."""

from __future__ import annotations

from importlib import import_module, util
from typing import Any


def has(name: str) -> bool:
    """Whether the top-level package `name` is installed. It is not imported."""
    return util.find_spec(name) is not None


def require(name: str, extra: str, wanted_by: str) -> Any:
    """Import the module `name`. Raises ModuleNotFoundError that says which extra of trainyard brings it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{wanted_by} needs {error.name}: pip install 'trainyard[{extra}]'", name=error.name
        ) from error
