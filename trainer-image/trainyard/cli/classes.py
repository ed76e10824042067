"""Classes by their import paths, or, for the library's and torch's own, by their names."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from trainyard.utilities.convert import ConversionError
from trainyard.utilities.hints import import_path, nearest, type_name

_PORTED = ("trainyard.pytorch.", "lightning.pytorch.", "pytorch_lightning.")
_CATALOGUES = (
    "trainyard.callbacks", "trainyard.loggers", "trainyard.strategies", "trainyard.profilers", "trainyard.plugins",
    "torch.optim", "torch.optim.lr_scheduler", "torch.nn", "trainyard.demos.boring_classes",
)  # fmt: skip


def find_class(name: str, base: type, place: str) -> Any:
    """`package.module.Class`, or the name of a class that derives from `base`. Raises ConversionError."""
    if "." in name:
        for prefix in _PORTED:
            if name.startswith(prefix):
                name = f"trainyard.{name.removeprefix(prefix)}"
        try:
            found = import_path(name)
        except ImportError as error:
            raise ConversionError(place, str(error)) from None
        if not callable(found):
            raise ConversionError(place, f"{name} is no class")
    else:
        known = by_name(base)
        if name not in known:
            raise ConversionError(place, f"there is no {type_name(base)} {name!r}{nearest(name, known)}")
        found = known[name]
    if isinstance(found, type) and not issubclass(found, base):
        raise ConversionError(place, f"{name} is no {type_name(base)}")
    return found


def by_name(base: type) -> dict[str, type]:
    """Subclasses of `base` that can be named without their module: of the catalogues, and those of the script."""
    found = {c.__name__: c for c in _subclasses(base) if c.__module__ == "__main__"}
    for module in _CATALOGUES:
        for name, cls in _public_classes(module):
            if issubclass(cls, base) and cls is not base:
                found.setdefault(name, cls)
    return found


def path_of(cls: Any) -> str:
    """The import path to write into a configuration."""
    module, name = cls.__module__, cls.__qualname__
    # torch.optim.adam.Adam is public as torch.optim.Adam.
    for catalogue in _CATALOGUES:
        if getattr(sys.modules.get(catalogue), name, None) is cls:
            return f"{catalogue}.{name}"
    return f"{module}.{name}"


@functools.cache
def _public_classes(module: str) -> tuple[tuple[str, type], ...]:
    try:
        found = import_module(module)
    except ImportError:
        return ()
    names: Iterable[str] = getattr(found, "__all__", None) or dir(found)
    pairs = []
    for name in names:
        try:
            value = getattr(found, name)
        except (ImportError, AttributeError):  # an optional package
            continue
        if isinstance(value, type) and not name.startswith("_"):
            pairs.append((name, value))
    return tuple(pairs)


def _subclasses(base: type) -> list[type]:
    if base is object:
        return []
    direct: list[type] = type.__subclasses__(base)
    return [*direct, *(deeper for cls in direct for deeper in _subclasses(cls))]
