"""Numeric precision: what the forward pass computes in, and how the backward pass is scaled."""

from __future__ import annotations

import difflib

from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.base import Precision
from trainyard.plugins.precision.mixed import MixedPrecision
from trainyard.plugins.precision.true import DoublePrecision, HalfPrecision

__all__ = ["DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision", "make_precision"]

NAMES = ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
_SHORT = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def make_precision(name: str | int | Precision | None) -> Precision:
    """What `Trainer(precision=...)` names. Raises MisconfigurationException."""
    if isinstance(name, Precision):
        return name
    text = "32-true" if name is None else str(name)
    text = _SHORT.get(text, text)
    if text.startswith("transformer-engine"):
        raise MisconfigurationException(f"precision: {name!r} is not supported; the nearest is 'bf16-mixed'")
    if text not in NAMES:
        near = difflib.get_close_matches(text, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MisconfigurationException(
            f"precision: {name!r} is none of {', '.join(map(repr, NAMES))}, 64, 32, 16, 'bf16'{hint}"
        )
    if text.endswith("-mixed"):
        return MixedPrecision(text)
    if text == "64-true":
        return DoublePrecision()
    return Precision() if text == "32-true" else HalfPrecision(text)
