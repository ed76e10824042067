"""Logs of the operator: one line a record, JSON or text, with the run that it is about.

The run comes from a context variable, so that code deep below a reconcile need not carry it. Whatever looks
like a bearer token is cut out of every line, exceptions included: a last line of defence, not a licence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

current_run: ContextVar[str] = ContextVar("current_run", default="")
"""namespace/name of the run that is worked on, or nothing."""

TOKEN = re.compile(r"eyJ[\w-]{4,}\.[\w-]{4,}\.[\w-]*|(?i:bearer)\s+[\w.~+/-]{8,}=*")
"""A JWT (they begin with the base64 of '{"'), or an Authorization header's value."""
QUIET = {
    "kopf": logging.WARNING,
    "kopf._core.reactor.running": logging.ERROR,  # at each start: "OS signals are ignored"
    "aiohttp": logging.WARNING,
    "asyncio": logging.WARNING,
}
"""Loggers of libraries, held at these levels unless the operator logs at debug."""


@contextlib.contextmanager
def about(namespace: str, name: str) -> Iterator[None]:
    """Lines logged inside are about this run."""
    token = current_run.set(f"{namespace}/{name}")
    try:
        yield
    finally:
        current_run.reset(token)


def redact(text: str) -> str:
    return TOKEN.sub("[token]", text)


class JsonFormatter(logging.Formatter):
    """Keys: time (RFC 3339, UTC), level, logger, message, run, error (a traceback)."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if run := current_run.get():
            line["run"] = run
        if record.exc_info:
            line["error"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for people; control characters of the message are shown escaped (no forged lines)."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        run = f" [{current_run.get()}]" if current_run.get() else ""
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in redact(record.getMessage()))
        name = record.name.removeprefix("trainyard_operator.")
        text = f"{time} {record.levelname[0]} {name}{run}: {message}"
        if record.exc_info:
            text += "\n" + redact(self.formatException(record.exc_info))
        return text


def setup(level: str, form: str, stream: TextIO | None = None) -> None:
    """Makes the root logger write to `stream` (stderr). Call it once, first thing."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name, least in QUIET.items():
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else max(least, root.level))
    logging.captureWarnings(True)
