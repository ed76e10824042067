"""Times as the API writes them. Everything inside the planner is Unix seconds."""

from __future__ import annotations

import math
from datetime import UTC, datetime

_LAST = 253402300799.0
"""9999-12-31T23:59:59Z: the largest time that RFC 3339 can write."""


def rfc3339(seconds: float) -> str:
    """metav1.Time: whole seconds. Absurd numbers are brought into the range that can be written."""
    return _utc(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro(seconds: float) -> str:
    """metav1.MicroTime: microseconds."""
    return _utc(seconds).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse(text: str) -> float | None:
    """Unix seconds of an RFC 3339 time; None when it is empty or is not one."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.timestamp() if moment.tzinfo else None
    except (ValueError, TypeError, OverflowError):
        return None


def within(seconds: float | None, earliest: float, latest: float) -> float:
    """`seconds` by another clock, brought between two times of ours; `latest` when there is none."""
    if seconds is None or not math.isfinite(seconds):
        return latest
    return min(max(seconds, earliest), latest)


def _utc(seconds: float) -> datetime:
    if not math.isfinite(seconds):
        seconds = 0.0
    seconds = min(max(seconds, 0.0), _LAST)
    # %Y does not pad years below 1000 on every platform; the range starts at 1970, so that it never matters.
    return datetime.fromtimestamp(round(seconds, 6), UTC)
