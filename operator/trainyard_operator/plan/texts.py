"""What others wrote, made fit for a status field, an Event or a log line."""

from __future__ import annotations

import math
import re

MAX_MESSAGE = 1024
"""Characters; the limit of Event notes and ours for conditions."""
MAX_INTEGER = 2**53 - 1
"""Largest integer that every JSON reader keeps exact; also below the int64 of the CRD's schema."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


def clean(text: object, limit: int = MAX_MESSAGE) -> str:
    """One line of at most `limit` characters, without control characters and lone surrogates."""
    line = _CONTROL.sub(" ", str(text)).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def whole(number: object, largest: int = MAX_INTEGER) -> int | None:
    """A count that the API can hold: negative becomes 0, absurd the largest; None if it is no integer."""
    if not isinstance(number, int) or isinstance(number, bool):
        return None
    return min(max(number, 0), largest)


def finite(number: object) -> float | None:
    """A float that JSON can hold, else None (NaN and the infinities are not JSON)."""
    if not isinstance(number, int | float) or isinstance(number, bool):
        return None
    try:
        value = float(number)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def listed(names: list[str], most: int = 3) -> str:
    """ "a, b, c and 7 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
