"""When to save: the same answer on all ranks, few messages, and the reasons of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.triggers import StepTrigger, TimeTrigger, Triggers
from trainyard_api.checkpoints import Record, Shard, shard_key


def test_step_trigger() -> None:
    every, in_twos, resumed = StepTrigger(3), StepTrigger(3), StepTrigger(3, seen=4)
    assert [s for s in range(1, 10) if every.due(s)] == [3, 6, 9]
    assert [s for s in range(2, 13, 2) if in_twos.due(s)] == [4, 6, 10, 12]
    assert [s for s in range(5, 10) if resumed.due(s)] == [6, 9]


class Gang:
    """Two time triggers as on two ranks: the second one hears what the first one said at the same step."""

    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self.said: tuple[bool, int] | None = None
        self.messages = 0
        self.leader = TimeTrigger(seconds, leader=True, broadcast=self._say, clock=lambda: self.now)
        # The other rank's clock is far off: nothing may be decided by it.
        self.other = TimeTrigger(
            seconds, leader=False, broadcast=self._hear, clock=lambda: self.now * 7 - 1000
        )

    def _say(self, verdict: tuple[bool, int]) -> tuple[bool, int]:
        self.said, self.messages = verdict, self.messages + 1
        return verdict

    def _hear(self, verdict: tuple[bool, int]) -> tuple[bool, int]:
        assert self.said is not None, "a rank waits for a message that nobody sends"
        said, self.said = self.said, None
        return said

    def step(self, step: int) -> bool:
        due = self.leader.due(step)
        assert self.other.due(step) == due
        assert self.said is None, "rank 0 sent a message that nobody waits for"
        if due:
            self.leader.saved()
            self.other.saved()
        return due


def test_time_trigger_saves_in_time_with_few_messages() -> None:
    gang = Gang(60)
    saves = []
    for step in range(1, 20001):
        gang.now += 0.1 if step < 10000 else 0.9  # training slows down
        if gang.step(step):
            saves.append(gang.now)
    gaps = [b - a for a, b in zip([0.0, *saves], saves, strict=False)]
    assert min(gaps) >= 60
    assert max(gaps) <= 60 + 16 * 0.9
    assert gang.messages < 20000 / 4


def test_time_trigger_with_steps_longer_than_the_interval_saves_at_each() -> None:
    gang = Gang(5)
    saves = []
    for step in range(1, 8):
        gang.now += 20
        saves.append(gang.step(step))
    assert all(saves)


class Wire:
    """Peers of two ranks in one thread: rank 0 speaks before rank 1 listens, and neither asks for more."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.messages = 0

    def rank(self, rank: int) -> Any:
        return WirePeers(self, rank)


class WirePeers:
    world = 2

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self.wire.said.append(list(value))  # as JSON would have it
            self.wire.messages += 1
            return list(value)
        assert self.wire.said, "a rank waits for a message that nobody sends"
        return self.wire.said.pop()

    def gather(self, value: Any) -> list[Any]:
        raise AssertionError("no trigger gathers")

    def any(self, flag: bool) -> bool:
        raise AssertionError("no trigger reduces")


class Pair:
    """The triggers of two ranks, whose clocks have nothing to do with each other."""

    def __init__(self, *, resumed: int = 0, records: list[Record] | None = None, **config: Any) -> None:
        self.now = 0.0
        self.wire = Wire()
        made = CheckpointConfig(uri="file:///nowhere", **config)
        clocks: list[Callable[[], float]] = [lambda: self.now, lambda: self.now * 7 - 1000]
        self.ranks = [Triggers(made, self.wire.rank(r), clocks[r]) for r in range(2)]
        for rank, triggers in enumerate(self.ranks):
            triggers.resumed(resumed, (records or []) if rank == 0 else [], now=1e9)

    def step(self, step: int, *, seconds: float = 1.0, epoch_end: bool = False) -> str:
        self.now += seconds
        reasons = [triggers.due(step, epoch_end=epoch_end) for triggers in self.ranks]
        assert reasons[0] == reasons[1]
        assert not self.wire.said, "rank 0 sent a message that nobody waits for"
        return reasons[0]

    def saved(self, stall: float, commit: float | None = None) -> None:
        for triggers in self.ranks:
            triggers.saved(stall)
        if commit is not None:
            self.ranks[0].committed(commit)


def test_by_steps_goes_on_where_the_resume_left_it() -> None:
    pair = Pair(every_n_steps=3, resumed=4)
    assert [s for s in range(5, 13) if pair.step(s) == "steps"] == [6, 9, 12]
    assert pair.wire.messages == 0


def test_without_any_trigger_it_is_the_epochs_end() -> None:
    pair = Pair()
    assert [pair.step(s, epoch_end=s == 3) for s in (1, 2, 3)] == ["", "", "epoch"]
    assert pair.wire.messages == 0


def test_steps_and_time_together_are_both_heard() -> None:
    pair = Pair(every_n_steps=50, every_n_seconds=20)
    reasons = {}
    for step in range(1, 101):
        if reason := pair.step(step, epoch_end=step % 10 == 0):
            reasons[step] = reason
            pair.saved(0.1)
    assert {reasons[50], reasons[100]} == {"steps"}
    assert "time" in reasons.values()
    assert "epoch" not in reasons.values()
    steps = sorted(reasons)
    assert all(b - a <= 20 + 16 for a, b in zip([0, *steps], steps, strict=False))


def test_a_save_that_was_left_out_is_not_asked_for_at_each_step() -> None:
    pair = Pair(every_n_seconds=80)
    asked = [s for s in range(1, 200) if pair.step(s)]  # nobody ever saves
    assert asked[0] >= 80
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert gaps
    assert min(gaps) >= 80 / 8
    pair.saved(0.1)
    assert not any(pair.step(s) for s in range(200, 279)), "and after a save the whole interval counts"


def test_auto_saves_early_to_measure_and_then_as_measured(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(auto=True)
    with caplog.at_level(logging.INFO, "trainyard.checkpoint"):
        steps = []
        for step in range(1, 2001):
            if reason := pair.step(step):
                assert reason == "auto"
                steps.append(step)
                pair.saved(0.5, commit=4.0)
    assert steps[0] <= 10 + 2
    # sqrt(2 * 0.5 s * 6 h) = 147 s, and a little more as the run lives on
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert min(gaps) >= 146
    assert max(gaps) <= 160 + 16
    assert pair.wire.messages < 2000 / 4
    said = [r.message for r in caplog.records if r.message.startswith("checkpoint interval")]
    assert len(said) == 1, "one line from rank 0; later changes are small"
    assert "147 s" in said[0]
    assert "0.5 s" in said[0]


def test_auto_says_when_a_save_has_become_dearer(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(auto=True)
    with caplog.at_level(logging.INFO, "trainyard.checkpoint"):
        for stall in (0.01, 0.01, 0.01, 0.4, 0.4, 0.4, 0.4, 0.4):
            pair.saved(stall)
    said = [r.message for r in caplog.records]
    assert len(said) >= 2
    assert all("(was " in line for line in said[1:])


def test_auto_after_a_resume_knows_what_its_saves_cost() -> None:
    pair = Pair(auto=True, records=[commit(seq=2, stall=0.5, world=2), commit(seq=3, stall=0.5, world=2)])
    assert next(s for s in range(1, 1000) if pair.step(s)) >= 100, "nothing is left to be measured"
    other = Pair(auto=True, records=[commit(seq=2, stall=0.5, world=4)])
    assert next(s for s in range(1, 1000) if other.step(s)) <= 12, "another world's saves say nothing"


def test_the_life_of_a_run_is_carried_on() -> None:
    record = commit(seq=2, stall=0.1, world=2, alive=5000.0, failures=3)
    pair = Pair(auto=True, records=[record])
    pair.now += 100
    life = pair.ranks[0].life
    assert life.failures == 4, "the attempt before ended without a word"
    assert 5100 <= life.seconds <= 5100 + 1800


def commit(*, seq: int, stall: float, world: int, alive: float = 0.0, failures: int = 0) -> Record:
    shards = [
        Shard(key=shard_key(seq, 1, rank, world), rank=rank, size=1, sha256="0" * 64) for rank in range(world)
    ]
    return Record(
        kind="commit", seq=seq, run="r", attempt=1, step=seq, time=1e9 - 100 + seq, world_size=world, shards=shards,
        stall_seconds=stall, alive_seconds=alive, failures=failures,
    )  # fmt: skip
