"""The agent's own log: one line per transition, on stderr."""

from __future__ import annotations

import os
import re
from contextlib import suppress

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def one_line(text: object, limit: int = 1024) -> str:
    """`text` without control characters, at most `limit` characters."""
    line = _CONTROL.sub(" ", str(text)).strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def say(text: str) -> None:
    """Writes one line in one write, so that it never mixes with a worker's. A closed stderr is not an error."""
    with suppress(OSError):
        os.write(2, f"trainyard-agent: {one_line(text, 2000)}\n".encode(errors="replace"))
