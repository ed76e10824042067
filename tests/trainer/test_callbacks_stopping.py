"""EarlyStopping and Timer: when a fit ends, and that a restart does not change it."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.callback_runs import Scored, run, same, weights
from tests.trainer.forkhost import Host
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import Callback, EarlyStopping, EarlyStoppingReason, Timer
from trainyard.callbacks.timer import seconds_of
from trainyard.checkpoint.triggers import TimeTrigger
from trainyard.errors import MisconfigurationException

NOT, THRESHOLD, DIVERGED, PATIENCE, ODD = EarlyStoppingReason

# ---- the judgement


@pytest.mark.parametrize(
    ("arguments", "values", "reason", "looks"),
    [
        ({"patience": 2}, [3, 1, 2, 0.5, 0.6, 0.7], PATIENCE, 6),
        ({"patience": 1, "mode": "max"}, [1, 2, 2], PATIENCE, 3),
        ({"patience": 1, "min_delta": 0.5}, [3, 2, 1.6], PATIENCE, 3),
        ({"patience": 1, "min_delta": -0.5, "mode": "max"}, [1, 2, 2.4], PATIENCE, 3),
        ({"patience": 0}, [1], NOT, 1),
        ({"patience": 0}, [1, 1], PATIENCE, 2),
        ({"stopping_threshold": 0.5}, [1, 0.5, 0.4], THRESHOLD, 3),
        ({"stopping_threshold": 5, "mode": "max"}, [4, 6], THRESHOLD, 2),
        ({"divergence_threshold": 10.0}, [1, 10, 11], DIVERGED, 3),
        ({}, [1, math.nan], ODD, 2),
        ({}, [1, math.inf], ODD, 2),
        ({"check_finite": False, "patience": 2}, [1, math.nan, math.nan], PATIENCE, 3),
        ({}, [3, 2, 1], NOT, 3),
    ],
)
def test_when_it_stops(
    arguments: dict[str, Any], values: list[float], reason: EarlyStoppingReason, looks: int
) -> None:
    stopping = EarlyStopping("score", **arguments)
    found = [stopping.judge(value)[0] for value in values]
    assert len(found) == looks
    assert set(found[:-1]) <= {NOT}
    assert found[-1] is reason


def test_state_key_and_mode() -> None:
    assert EarlyStopping("a").state_key == "EarlyStopping{'monitor': 'a', 'mode': 'min'}"
    with pytest.raises(MisconfigurationException, match="mode='up'"):
        EarlyStopping("a", mode="up")


# ---- in a fit


def fitted(stopping: EarlyStopping, module: Any = None, **kwargs: Any) -> Any:
    fit = trainer(callbacks=stopping, num_sanity_val_steps=2, **{"max_epochs": 10} | kwargs)
    fit.fit(module or Scored(), loader(32, 8), loader(8, 8))
    return fit


def test_a_fit_ends_when_patience_does() -> None:
    stopping = EarlyStopping("score", patience=2, verbose=True)
    fit = fitted(stopping, Scored((3.0, 1.0, 2.0, 4.0, 0.1)))
    assert fit.current_epoch == 4
    assert (stopping.stopped_epoch, stopping.wait_count) == (3, 2)
    assert stopping.best_score == 1.0
    assert stopping.stopping_reason is PATIENCE
    assert stopping.stopping_reason_message is not None


def test_it_looks_when_validation_ends_where_that_is_not_the_epochs_end() -> None:
    stopping = EarlyStopping("score", patience=1)
    fit = fitted(stopping, Scored((1.0, 1.0), batches=2), val_check_interval=2)
    assert fit.global_step == 4
    stopping = EarlyStopping("score", patience=1)
    fit = fitted(stopping, Scored((1.0, 1.0), batches=4), check_val_every_n_epoch=2)
    assert fit.current_epoch == 4


def test_it_may_watch_the_training(tmp_path: Path) -> None:
    stopping = EarlyStopping("loss", stopping_threshold=1e9)
    assert fitted(stopping, limit_val_batches=0).current_epoch == 1


def test_min_epochs_comes_first() -> None:
    assert fitted(EarlyStopping("score", patience=1), Scored((1.0,)), min_epochs=5).current_epoch == 5


def test_what_nobody_logs(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match=r"monitor='nope'.*there is: loss.*score"):
        fitted(EarlyStopping("nope"))
    assert fitted(EarlyStopping("nope", strict=False), max_epochs=2).current_epoch == 2
    assert "monitor='nope'" in caplog.text


def test_state_as_lightning_writes_it() -> None:
    stopping = EarlyStopping("score")
    stopping.load_state_dict(
        {"wait_count": 1, "stopped_epoch": 0, "best_score": torch.tensor(0.5), "patience": 2}
    )
    assert stopping.judge(0.6)[0] is PATIENCE


# ---- restarts


def attributes(stopping: Any) -> dict[str, Any]:
    state = stopping.state_dict()
    return {**state, "best_score": float(state["best_score"])}


@pytest.mark.parametrize("interval", [1.0, 2])
def test_a_broken_run_stops_where_an_unbroken_one_does(tmp_path: Path, interval: float) -> None:
    scores = (3.0, 1.0, 1.5, 2.0, 0.1) if interval == 1.0 else (3.0, 1.0, 1.5, 0.9, 1.0, 1.1, 1.2, 0.1)

    def make(folder: Path) -> list[Callback]:
        return [EarlyStopping("score", patience=3 if interval == 1.0 else 4)]

    def scored() -> Scored:
        return Scored(scores, batches=4 if interval == 1.0 else 2)

    arguments = {"module": scored, "epochs": 9, "val_check_interval": interval}
    fit, net, (unbroken,) = run(tmp_path / "unbroken", make, **arguments)
    assert fit.loop_state.total_batches < 36
    for stop in range(1, fit.loop_state.total_batches, 2):
        run(tmp_path / str(stop), make, stop_at=stop, every=2, **arguments)
        again, resumed, (broken,) = run(tmp_path / str(stop), make, every=2, **arguments)
        assert again.global_step == fit.global_step, stop
        assert same(weights(resumed), weights(net)), stop
        assert attributes(broken) == attributes(unbroken), stop


def test_a_run_that_has_stopped_does_not_go_on_when_it_is_restarted(tmp_path: Path) -> None:
    def make(folder: Path) -> list[Callback]:
        return [EarlyStopping("score", patience=2)]

    first, *_ = run(tmp_path, make, epochs=9)
    second, *_ = run(tmp_path, make, epochs=9)
    assert first.global_step == second.global_step == 24


def test_asked_for_more_it_goes_on(tmp_path: Path) -> None:
    """fit(ckpt_path=...) of a file that was written when the run had stopped."""
    fit = fitted(EarlyStopping("score", patience=1), Scored((1.0,)))
    assert fit.current_epoch == 2
    fit.save_checkpoint(tmp_path / "a.ckpt")
    more = trainer(callbacks=EarlyStopping("score", patience=1), max_epochs=10, num_sanity_val_steps=0)
    more.fit(Scored((1.0, 1.0, 0.5, 1.0)), loader(32, 8), loader(8, 8), ckpt_path=tmp_path / "a.ckpt")
    assert more.current_epoch == 4


# ---- time


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("01:02:03:04", 93784.0),
        (timedelta(minutes=2), 120.0),
        ({"hours": 1, "seconds": 5}, 3605.0),
    ],
)
def test_durations(duration: Any, seconds: float) -> None:
    assert seconds_of(duration) == seconds


@pytest.mark.parametrize("duration", ["1:2", "a:b:c:d", {"lightyears": 1}, 5])
def test_what_is_no_duration(duration: Any) -> None:
    with pytest.raises(MisconfigurationException, match="duration"):
        Timer(duration)


def test_an_interval_that_is_none() -> None:
    with pytest.raises(MisconfigurationException, match="interval='week'"):
        Timer(interval="week")


class Clock:
    """A second a batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("trainyard.callbacks.timer.time.monotonic", lambda: self.now)
        defaults = dict(TimeTrigger.__init__.__kwdefaults__)
        monkeypatch.setattr(TimeTrigger.__init__, "__kwdefaults__", {**defaults, "clock": lambda: self.now})

    def ticking(self) -> Callback:
        clock = self

        class Tick(Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                clock.now += 1

        return Tick()


def test_training_ends_when_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timer = Clock(monkeypatch), Timer({"seconds": 5})
    fit = trainer(callbacks=[clock.ticking(), timer], max_epochs=100)
    fit.fit(Regression(), loader())
    assert fit.global_step == 5
    assert timer.time_elapsed() == 5.0
    assert timer.time_remaining() == 0.0
    assert timer.start_time() == 1000.0
    assert timer.end_time("train") == 1005.0
    assert timer.time_elapsed("validate") == 0.0


def test_at_the_end_of_an_epoch_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = trainer(
        callbacks=[Clock(monkeypatch).ticking(), Timer({"seconds": 5}, interval="epoch")], max_epochs=100
    )
    fit.fit(Regression(), loader())
    assert fit.current_epoch == 2


def test_time_before_a_restart_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)

    def make(folder: Path) -> list[Callback]:
        return [clock.ticking(), Timer({"seconds": 9})]

    run(tmp_path, make, stop_at=6)
    fit, _, (_, timer) = run(tmp_path, make)
    assert fit.global_step in (8, 9)  # the save of step 5 or 6, of which one second is lost
    assert isinstance(timer, Timer)
    assert timer.time_elapsed() == 9.0


def test_a_run_whose_time_is_up_does_not_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    first, *_ = run(tmp_path, lambda folder: [clock.ticking(), Timer({"seconds": 6})])
    second, *_ = run(tmp_path, lambda folder: [clock.ticking(), Timer({"seconds": 6})])
    assert first.global_step == second.global_step == 6


def test_most_steps_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 steps far from the end, at most one in eight has a message."""
    clock, asked = Clock(monkeypatch), []

    class Listening(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            peers = trainer.strategy.peers
            broadcast = peers.broadcast
            monkeypatch.setattr(peers, "broadcast", lambda value: (asked.append(value), broadcast(value))[1])

    callbacks = [clock.ticking(), Listening(), Timer({"hours": 1})]
    trainer(callbacks=callbacks, max_steps=400, max_epochs=-1).fit(Regression(), loader(400, 4))
    assert 0 < len(asked) < 50


RANKS = """
import time
import trainyard as L
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import Timer

fit = trainer(callbacks=Timer({"seconds": 1}), max_epochs=-1, strategy="ddp")
fit.fit(Regression(), loader(16, 4))
print("RESULT", fit.global_step)
"""


def test_ranks_end_at_the_same_step(host: Host, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    ranks = host.run([str(script)], world=2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    one, other = (next(t for t in rank.output.splitlines() if t.startswith("RESULT")) for rank in ranks)
    assert one == other != "RESULT 0"
