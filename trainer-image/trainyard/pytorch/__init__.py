"""`trainyard.pytorch` is `trainyard`, for ports of `lightning.pytorch`: every module here is the very same object.

import trainyard.pytorch as pl
from trainyard.pytorch.callbacks import ModelCheckpoint   # is trainyard.callbacks.ModelCheckpoint
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

import trainyard

_HERE = f"{__name__}."


class _Alias(Loader):
    """Loads `trainyard.x` in the place of `trainyard.pytorch.x`."""

    def __init__(self, real: str) -> None:
        self._real = real
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._real)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has been executed. The import system has put the alias's spec into it: back with its own."""
        module.__spec__ = self._spec


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_HERE):
            return None
        real = f"trainyard.{fullname.removeprefix(_HERE)}"
        found = find_spec(real)
        if found is None:
            return None
        return spec_from_loader(
            fullname, _Alias(real), is_package=found.submodule_search_locations is not None
        )


# Before the others: they would find the files, and load them a second time under the other name.
sys.meta_path.insert(0, _Finder())

__all__ = list(trainyard.__all__)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(trainyard, name)


def __dir__() -> list[str]:
    return dir(trainyard)
