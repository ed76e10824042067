"""Questions about modules and data modules."""

from __future__ import annotations

from typing import Any


def is_overridden(method_name: str, instance: Any = None, parent: type | None = None) -> bool:
    """Whether `instance` has a `method_name` of its own in place of `parent`'s, which is by default the library's class
    that it derives from. Raises ValueError for an instance of no such class."""
    if instance is None:
        return False
    if parent is None:
        parent = _library_class(instance)
    original = getattr(parent, method_name, None)
    if original is None:
        raise ValueError(f"{parent.__name__} has no {method_name!r}")
    own = getattr(instance, method_name, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(original, "__func__", original)


def _library_class(instance: Any) -> type:
    from trainyard.callbacks.base import Callback
    from trainyard.core.datamodule import LightningDataModule
    from trainyard.core.module import LightningModule

    for parent in (LightningModule, LightningDataModule, Callback):
        if isinstance(instance, parent):
            return parent
    raise ValueError(
        f"a {type(instance).__name__} is no module, data module or callback: say which `parent` is meant"
    )
