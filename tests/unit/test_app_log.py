"""Logs: one line a record, the run in it, and no tokens."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from tests.unit.coordinator_tools import jwt
from trainyard_operator import log

TOKEN = jwt("p1")


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was (pytest's handlers are on it)."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in log.QUIET:
        logging.getLogger(name).setLevel(logging.NOTSET)


def written(level: str, form: str, write: logging.Logger | None = None) -> list[str]:
    stream = io.StringIO()
    log.setup(level, form, stream)
    logger = logging.getLogger("trainyard_operator.part")
    logger.info("before")
    with log.about("ns", "run-1"):
        logger.warning("two\nlines of %s", "text")
        try:
            raise ValueError(f"bad header Authorization: Bearer {TOKEN}")
        except ValueError:
            logger.exception("failed with %s", TOKEN)
    logging.getLogger("kopf.objects").info("chatter")
    return stream.getvalue().splitlines()


def test_json_is_one_object_a_line(restored: None) -> None:
    lines = [json.loads(line) for line in written("info", "json")]
    assert [line["message"] for line in lines] == ["before", "two\nlines of text", "failed with [token]"]
    assert [line.get("run") for line in lines] == [None, "ns/run-1", "ns/run-1"]
    assert lines[1]["level"] == "warning" and lines[1]["logger"] == "trainyard_operator.part"
    assert "ValueError: bad header Authorization: [token]" in lines[2]["error"]
    assert TOKEN not in json.dumps(lines)


def test_text_cannot_be_forged_and_has_no_tokens(restored: None) -> None:
    lines = written("info", "text")
    assert lines[1].endswith("W part [ns/run-1]: two\\nlines of text")
    assert TOKEN not in "\n".join(lines) and "[token]" in lines[2]


def test_level_and_quiet_libraries(restored: None) -> None:
    assert [json.loads(line)["level"] for line in written("error", "json")] == ["error"]
    assert any("chatter" in line for line in written("debug", "json"))
