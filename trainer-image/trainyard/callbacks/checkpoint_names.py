"""File names of checkpoints: templates filled with metrics, and a version where a name is taken. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

from trainyard.errors import MisconfigurationException


def fill(template: str, metrics: Mapping[str, Any], *, insert_names: bool = True, equals: str = "=") -> str:
    """`{epoch:02d}-{val_loss:.2f}` becomes `epoch=02-val_loss=0.32`; without `insert_names`, `02-0.32`.

    What is not in `metrics` is 0. Raises MisconfigurationException for a template that cannot be filled.
    """
    parts: list[str] = []
    try:
        for literal, name, spec, _ in Formatter().parse(template):
            parts.append(literal)
            if name is not None:
                parts.append(f"{name}{equals}" if insert_names else "")
                parts.append(format(plain(metrics.get(name, 0)), spec or ""))
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(
            f"ModelCheckpoint(filename={template!r}) cannot be filled with the metrics: {error}"
        ) from error
    return "".join(parts)


def plain(value: Any) -> Any:
    """The number in a tensor."""
    return value.item() if hasattr(value, "item") else value


def with_position(metrics: Mapping[str, Any], *, epoch: int, step: int) -> dict[str, Any]:
    """`metrics` with `epoch` and `step`; values logged under these names win, as whole numbers (Lightning's rule)."""
    found = {name: plain(value) for name, value in metrics.items()}
    return {**found, "epoch": int(found.get("epoch", epoch)), "step": int(found.get("step", step))}


def first_free(name: Callable[[int | None], str], taken: Callable[[str], bool], *, start: int = 1) -> str:
    """`name(None)`, or the first of `name(start)`, `name(start + 1)`... that is not taken."""
    found, version = name(None), start
    while taken(found):
        found, version = name(version), version + 1
    return found
