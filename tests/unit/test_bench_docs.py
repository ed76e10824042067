"""docs/performance.md: what tests/bench/trainer_docs.py makes of a results file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import trainer_docs
from tests.bench.main import spread
from tests.bench.trainer import over


def results(ours: float = 20.0, log: float = 5.0, load: float = 1.1) -> dict[str, Any]:
    """As `tests.bench.trainer.measure` would, had it measured these."""
    raw = [100.0, 101.0, 104.0]
    steps = {"raw loop": raw, "trainyard": [x + ours for x in raw], "lightning": [x + 333 for x in raw]}
    both = ("trainyard", "lightning")
    return {
        "what": "trainer", "date": "2026-11-20T10:00:00+00:00", "commit": "0123456789abcdef", "cpu": "a CPU", "cores": 2,
        "memory_gib": 8.0, "load_before": 0.05, "versions": {"torch": "2.15.0", "lightning": "2.6.6"}, "shape": "a shape",
        "microseconds_a_step": {name: spread(values) for name, values in steps.items()},
        "microseconds_a_step_over_the_raw_loop": over(steps, "raw loop"),
        "microseconds_a_log": {"trainyard": spread([log] * 3), "lightning": spread([300.0, 310.0, 305.0])},
        "two_ranks_microseconds_a_step": {name: spread([9.0, 8.0]) for name in both},
        "two_ranks_microseconds_over_raw_ddp": {name: spread([7.0, 6.0]) for name in both},
        "microseconds_between_epochs": {name: spread([5.0, 4.0]) for name in both},
        "mib_resident": {name: spread([300.0]) for name in both},
        "import_seconds": {"torch": spread([1.0]), "trainyard": spread([load])},
    }  # fmt: skip


def test_the_pages_markers_are_there_and_kept() -> None:
    page = trainer_docs.PAGE.read_text(encoding="utf-8")
    once = trainer_docs.render(page, results(), "../tests/bench/results/x-trainer.json")
    head, tail = page.split(trainer_docs.BEGIN)[0], page.split(trainer_docs.END)[1]
    assert once.startswith(head)
    assert once.endswith(tail)
    assert trainer_docs.render(once, results(), "../tests/bench/results/x-trainer.json") == once


def test_numbers_are_those_of_the_file() -> None:
    text = trainer_docs.figures(results(), "../tests/bench/results/x-trainer.json")
    assert "| lightning | 333 | 333 to 333 | 3 |" in text
    assert "| trainyard | 5.00 | 5.00 to 5.00 | 3 |" in text
    assert "| raw loop | 101 | 100 to 104 | 3 |" in text
    assert "[x-trainer.json](../tests/bench/results/x-trainer.json)" in text
    assert "commit `0123456`" in text


@pytest.mark.parametrize(
    ("found", "row", "held"),
    [
        (results(ours=30.0), "a step without a log", "yes"),
        (results(ours=30.1), "a step without a log", "**no**"),
        (results(log=10.0), "each `self.log`", "yes"),
        (results(log=10.1), "each `self.log`", "**no**"),
        (results(load=1.2), "`import trainyard`", "yes"),
        (results(load=1.3), "`import trainyard`", "**no**"),
    ],
)
def test_bounds_that_are_not_held_are_said(found: dict[str, Any], row: str, held: str) -> None:
    (line,) = [x for x in trainer_docs.figures(found, "x.json").splitlines() if x.startswith(f"| {row}")]
    assert re.search(rf"\| {re.escape(held)} \|$", line)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="begin: figures"):
        trainer_docs.render("# Performance\n", results(), "x.json")


def test_the_command_writes_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, file = tmp_path / "performance.md", tmp_path / "2026-trainer.json"
    page.write_text(trainer_docs.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    file.write_text(json.dumps(results()))
    monkeypatch.setattr(sys, "argv", ["trainer_docs", str(file), "--page", str(page)])
    trainer_docs.main()
    assert "| lightning | 333 |" in page.read_text(encoding="utf-8")
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_other_results_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recovery.json"
    file.write_text(json.dumps({"what": "recovery"}))
    monkeypatch.setattr(sys, "argv", ["trainer_docs", str(file), "--page", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit):
        trainer_docs.main()
    assert "bench recovery" in capsys.readouterr().err
