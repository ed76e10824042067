"""Numeric precision: what the forward pass computes in, and how the backward pass is scaled."""

from __future__ import annotations

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.base import Precision
from trainyard.plugins.precision.mixed import BFloat16Mixed

__all__ = ["BFloat16Mixed", "Precision", "make_precision"]

_BY_NAME: dict[str, type[Precision]] = {
    "32": Precision, "32-true": Precision, "bf16": BFloat16Mixed, "bf16-mixed": BFloat16Mixed,
}  # fmt: skip


def make_precision(name: str | int | Precision | None) -> Precision:
    """Raises MisconfigurationException."""
    if isinstance(name, Precision):
        return name
    kind = _BY_NAME.get(str(name or "32-true"))
    if kind is None:
        raise MisconfigurationException(f"precision: {name!r} is none of {', '.join(_BY_NAME)}")
    return kind()
