"""JSON lines from a descriptor that is read when it is readable."""

from __future__ import annotations

import json
import os
from typing import Any

MAX_LINE = 64 * 1024


class Closed(Exception):
    """The other side closed it, or sent what is not JSON lines."""


class LineReader:
    """Collects what arrives and cuts it into JSON objects."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """The objects that are complete now. Call it when the descriptor is readable, or if it is non-blocking.

        Raises Closed at the end of the stream, and for a line that is too long or not a JSON object.
        """
        try:
            part = os.read(self._fd, 65536)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Closed(str(error)) from None
        if not part:
            raise Closed("end of stream")
        *lines, self._rest = (self._rest + part).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise Closed(f"a line of more than {MAX_LINE} bytes")
        return [_object(line) for line in lines if line.strip()]


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise Closed(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Closed("not a JSON object")
    return value
