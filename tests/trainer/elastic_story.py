"""Runs `elastic_run.py` in parts, each on another number of processes, and reads what they left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.trainer.forkhost import Host, Rank

SCRIPT = str(Path(__file__).with_name("elastic_run.py"))


class Story:
    """One run."""

    def __init__(self, host: Host, folder: Path, **options: Any) -> None:
        self.host, self.folder, self.options = host, folder, options
        folder.mkdir(parents=True)
        self.ranks: list[Rank] = []
        self.result: dict[str, Any] = {}

    def part(self, world: int, steps: int = -1, *, code: int = 0, **more: Any) -> Story:
        """Go on at `world` processes, until step `steps` of the run."""
        end = self.folder / "end.ckpt"
        options = {
            **self.options, "folder": str(self.folder), "steps": steps, "resume": str(end) if end.exists() else "", **more
        }  # fmt: skip
        self.ranks = self.host.run([SCRIPT, json.dumps(options)], world=world, seconds=120)
        said = "\n".join(rank.output[-3000:] for rank in self.ranks)
        assert {rank.code for rank in self.ranks} == {code}, said
        if not code:
            (line,) = [x for x in self.ranks[0].output.splitlines() if x.startswith("RESULT ")]
            self.result = json.loads(line.removeprefix("RESULT "))
        return self

    def parts(self, schedule: Sequence[tuple[int, int]], **more: Any) -> Story:
        """(processes, until which step) for each part."""
        for world, steps in schedule:
            self.part(world, steps, **more)
        return self

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "samples").read_text().splitlines()]

    def samples(self, epoch: int) -> Counter[int]:
        """How often each was trained on."""
        return Counter(i for line in self.lines if line["epoch"] == epoch for i in line["ids"])

    def steps(self) -> dict[int, Counter[int]]:
        """The samples of each optimizer step."""
        found: dict[int, Counter[int]] = {}
        for line in self.lines:
            found.setdefault(line["step"], Counter()).update(line["ids"])
        return found

    @property
    def output(self) -> str:
        return self.ranks[0].output
