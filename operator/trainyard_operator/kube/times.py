"""Times as the API writes them."""

from __future__ import annotations

import datetime


def micro_time(seconds: float) -> str:
    """Unix seconds as metav1.MicroTime: RFC 3339 in UTC, always six digits of a second."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
