"""Profilers: what they measure, what they write, and that nothing of them is there when nobody asked."""

from __future__ import annotations

import json
import pstats
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks.base import Callback
from trainyard.errors import MisconfigurationException
from trainyard.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
    make_profiler,
)


class Net(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_train_epoch_end(self) -> None:
        with self.trainer.profiler.profile("[User]mine"):
            needle()


class Watcher(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        needle()


def needle() -> None:
    """To be found in reports."""


class Recorder(Profiler):
    """One of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def start(self, action_name: str) -> None:
        self.events.append(f"+{action_name}")

    def stop(self, action_name: str) -> None:
        self.events.append(f"-{action_name}")


def test_actions_have_lightnings_names_and_nest() -> None:
    """Names that a run of Lightning 2.6.6 with SimpleProfiler printed."""
    recorder = Recorder()
    trainer(profiler=recorder, callbacks=[Watcher()], num_sanity_val_steps=0).fit(Net(), loader(8), loader(4))
    counts = {name[1:]: recorder.events.count(name) for name in recorder.events if name[0] == "+"}
    expected = {
        "run_training_epoch": 1,
        "run_training_batch": 2,
        "[_TrainingEpochLoop].train_dataloader_next": 3,
        "[Strategy]Strategy.training_step": 2,
        "[Strategy]Strategy.backward": 2,
        "[Strategy]Strategy.validation_step": 1,
        "[LightningModule]Net.optimizer_step": 2,
        "[LightningModule]Net.optimizer_zero_grad": 2,
        "[LightningModule]Net.on_train_epoch_end": 1,
        "[Callback]Watcher.on_train_batch_end": 2,
        "[User]mine": 1,
    }
    strategy = next(name for name in counts if name.endswith(".training_step")).split("]")[1].split(".")[0]
    assert {
        k.replace("]Strategy.", f"]{strategy}."): v for k, v in expected.items()
    }.items() <= counts.items()
    stack: list[str] = []
    for event in recorder.events:
        if event[0] == "+":
            stack.append(event[1:])
        else:
            assert stack.pop() == event[1:]
    assert not stack


def test_with_a_profiler_a_fit_computes_the_same() -> None:
    weights = []
    for profiler in (None, SimpleProfiler(), AdvancedProfiler(), PyTorchProfiler(export_to_chrome=False)):
        net = Net()
        trainer(profiler=profiler, accumulate_grad_batches=2, gradient_clip_val=0.1).fit(
            net, loader(20), loader(4)
        )
        weights.append(net.net.weight.detach())
    assert all(torch.equal(weight, weights[0]) for weight in weights[1:])


def test_without_a_profiler_hooks_are_called_as_they_are() -> None:
    fit = trainer(callbacks=[Watcher()])
    fit.fit(Net(), loader(8))
    assert isinstance(fit.profiler, PassThroughProfiler)
    (hook,) = fit.hooks.find("on_train_batch_end")
    assert hook.func.__func__ is Watcher.on_train_batch_end  # type: ignore[attr-defined]


def test_simple_adds_up_durations_by_its_clock(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    profiler = SimpleProfiler(clock=lambda: now[0])
    for took in (1.0, 3.0):
        with profiler.profile("outer"), profiler.profile("inner"):
            now[0] += took
    now[0] += 4.0
    assert (profiler.durations["inner"].count, profiler.durations["inner"].mean) == (2, 2.0)
    lines = [line.split() for line in profiler.summary().splitlines()]
    assert ["inner", "2.0", "3.0", "2", "4.0", "50.0"] in lines
    assert ["Total", "-", "-", "4", "8.0", "100", "%"] in lines
    with pytest.raises(ValueError, match="'x' has not started"):
        profiler.stop("x")
    profiler.start("x")
    with pytest.raises(ValueError, match="'x' has started already"):
        profiler.start("x")
    profiler.describe()
    assert "Profiler Report" in capsys.readouterr().out


def test_simple_writes_a_report_for_each_entry_point(tmp_path: Path) -> None:
    fit = trainer(profiler=SimpleProfiler(tmp_path, "times", extended=False))
    fit.fit(Net(), loader(8), loader(4))
    fit.validate(Net(), loader(4), verbose=False)
    report = (tmp_path / "fit-times-0.txt").read_text()
    assert report.startswith("FIT Profiler Report") and "run_training_epoch" in report
    assert (tmp_path / "validate-times-0.txt").read_text().startswith("VALIDATE Profiler Report")


def test_advanced_finds_functions_in_the_actions_around_them(tmp_path: Path) -> None:
    profiler = AdvancedProfiler(tmp_path, "calls", line_count_restriction=5, dump_stats=True)
    trainer(profiler=profiler, callbacks=[Watcher()]).fit(Net(), loader(8))
    found = profiler.profiled_actions

    def calls(action: str) -> int:
        stats: dict[Any, Any] = found[action].stats  # type: ignore[attr-defined]
        return sum(int(value[1]) for (_, _, name), value in stats.items() if name == "needle")

    assert calls("[Callback]Watcher.on_train_batch_end") == 2
    assert calls("[User]mine") == 1
    assert calls("run_training_batch") == 2
    assert calls("run_training_epoch") == 3
    assert "Profile stats for: run_training_epoch" in (tmp_path / "fit-calls-0.txt").read_text()
    dumped = pstats.Stats(str(tmp_path / "fit-calls-[User]mine-0.prof"))
    assert any(name == "needle" for _, _, name in dumped.stats)  # type: ignore[attr-defined]


def test_pytorch_records_operators_and_writes_traces(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(tmp_path, "ops", row_limit=60)
    net = Net()
    trainer(profiler=profiler, num_sanity_val_steps=0).fit(net, loader(32), loader(24))
    report = (tmp_path / "fit-ops-0.txt").read_text()
    training, validation = report.split("Profile stats for: validation_step")
    for name in ("aten::linear", "[module]Linear: net", "MseLossBackward0", ".training_step"):
        assert name in training
    assert "aten::linear" in validation and "MseLossBackward0" not in validation
    trace = json.loads((tmp_path / "fit-ops-training_step-1-0.pt.trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert sum(1 for name in names if name == "[module]Linear: net") == 3
    assert not net.net._forward_hooks and not net.net._forward_pre_hooks


def test_pytorch_follows_a_schedule_and_hands_over(tmp_path: Path) -> None:
    steps: list[int] = []
    profiler = PyTorchProfiler(
        tmp_path,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),
        on_trace_ready=lambda profile: steps.append(profile.step_num),
        record_module_names=False,
    )
    trainer(profiler=profiler).fit(Net(), loader(32))
    assert len(steps) == 4 and not list(tmp_path.iterdir())


def test_an_exception_leaves_no_profiler_behind() -> None:
    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    for profiler in (AdvancedProfiler(), PyTorchProfiler(export_to_chrome=False)):
        with pytest.raises(ArithmeticError):
            trainer(profiler=profiler).fit(Broken(), loader(32))
    again = PyTorchProfiler(export_to_chrome=False)
    trainer(profiler=again).fit(Net(), loader(32))
    assert "aten::linear" in again.summary()


def test_which_profiler_is_meant() -> None:
    assert isinstance(make_profiler("simple"), SimpleProfiler)
    assert isinstance(make_profiler("Advanced"), AdvancedProfiler)
    assert isinstance(make_profiler("pytorch"), PyTorchProfiler)
    assert isinstance(make_profiler(None), PassThroughProfiler)
    with pytest.raises(MisconfigurationException, match="'fast' is none of 'simple', 'advanced', 'pytorch'"):
        make_profiler("fast")
    with pytest.raises(MisconfigurationException, match=r"torch.profiler.profile has no memory"):
        PyTorchProfiler(memory=True)
    with pytest.raises(MisconfigurationException, match="sort_by_key: 'speed'"):
        PyTorchProfiler(sort_by_key="speed")
