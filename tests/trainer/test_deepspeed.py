"""strategy="deepspeed", with the real engine: two processes on the CPU with gloo, in an environment of its own."""

from __future__ import annotations

import csv
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from devcluster.venvs import environment
from tests.trainer import peer_ranks
from tests.trainer.test_strategies import close
from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.plugins.precision.deepspeed import DeepSpeedPrecision
from trainyard.strategies import deepspeed, deepspeed_config, make_strategy
from trainyard.utilities.optional import has

SCRIPT = str(Path(__file__).with_name("deepspeed_cases.py"))
STAGES = ("1", "2", "3")
RESUMED_STAGE = "3"
"""The stage that is killed: the one with the most state that is nowhere whole."""

python = pytest.fixture(scope="module")(lambda: environment("deepspeed", seconds=600) / "bin" / "python")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def found(python: Path, folder: Path) -> dict[str, Any]:
    """Of rank 0."""
    return peer_ranks.run(python, SCRIPT, "first", folder, world=2)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def resumed(python: Path, folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    run = partial(peer_ranks.run, python, SCRIPT, folder=folder, world=2, STAGE=RESUMED_STAGE)
    run(case="killed", code=-9)
    return run(case="resumed")[0]  # type: ignore[no-any-return]


def same(one: Any, other: Any, atol: float = 0.0) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# ---- numbers


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("options", ["plain", "clip, accumulate, validate"])
def test_a_stage_trains_what_ddp_trains(found: dict[str, Any], stage: str, options: str) -> None:
    numbers = found["numbers"]
    wanted = numbers[f"ddp {options}"]
    close(numbers[f"{stage} {options}"], wanted)
    same(numbers[f"{stage} {options}"]["losses"], wanted["losses"], 1e-6)
    same(numbers[f"{stage} {options}"]["after"], wanted["after"], 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_batch_norm_is_synchronised(found: dict[str, Any], stage: str) -> None:
    close(found["numbers"][f"{stage} batch norm"], found["numbers"]["ddp batch norm"])


@pytest.mark.parametrize("stage", ["2", "3"])
def test_what_is_offloaded_trains_the_same(found: dict[str, Any], stage: str) -> None:
    close(found["numbers"][f"{stage} offload plain"], found["numbers"]["ddp plain"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_weights_are_kept_in_32_bit(found: dict[str, Any], stage: str, precision: str) -> None:
    run, wanted = found["precisions"][f"{stage} {precision}"], found["numbers"]["ddp plain"]
    weights = run["model"]["body.0.weight"]
    assert weights.dtype == torch.float32
    narrow = torch.float16 if precision == "16-mixed" else torch.bfloat16
    assert not torch.equal(weights, weights.to(narrow).float())
    same(run["losses"], wanted["losses"], 0.1)
    assert run["losses"] != wanted["losses"]
    kept = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert run["after"]["body.0.weight"].dtype == kept


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_whose_gradients_do_not_fit_is_left_out(found: dict[str, Any], stage: str) -> None:
    assert found["precisions"][f"{stage} scaler"] == [32.0, 16.0, True, True]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["groups", "momentum", "adagrad"])
def test_optimizers_keep_their_layout(found: dict[str, Any], stage: str, kind: str) -> None:
    close(found["optimizers"][f"{stage} {kind}"], found["optimizers"][f"ddp {kind}"])


@pytest.mark.parametrize("stage", ["1", "2"])
def test_manual_optimization(found: dict[str, Any], stage: str) -> None:
    runs = found["manual"]
    assert runs[stage]["steps"] == runs["ddp"]["steps"] == 7
    same(runs[stage]["weights"], runs["ddp"]["weights"], 1e-6)


@pytest.mark.parametrize(
    ("name", "says"),
    [("two", "one optimizer, there are 2"), ("manual, stage 3", "stage 1 or 2"), ("value", "by norm only"),
     ("lbfgs", "LBFGS"),
     ("lr_find", "lr_find cannot take back"), ("double", "'64-true'"), ("ddp", "zero_optimization"), ("nvme", "'nvme'")],
)  # fmt: skip
def test_what_it_cannot_do_it_says(found: dict[str, Any], name: str, says: str) -> None:
    assert says in found["refusals"][name]


# ---- a run with the Trainer


@pytest.mark.parametrize("stage", STAGES)
def test_a_fit_is_that_of_ddp(found: dict[str, Any], folder: Path, stage: str) -> None:
    """Accumulation with a partial window, clipping, a scheduler, dropout, logged values, validation."""
    runs = found["fits"]
    assert runs[stage]["steps"] == runs["ddp"]["steps"] == 16
    same(runs[stage]["weights"], runs["ddp"]["weights"], 2e-6)
    assert runs[stage]["metrics"] == pytest.approx(runs["ddp"]["metrics"], abs=1e-5)
    assert runs[f"{stage} again"]["weights"].keys() == runs["ddp"]["weights"].keys()
    same(runs[f"{stage} again"]["weights"], runs[stage]["weights"])
    assert rates(folder / stage) == rates(folder / "ddp")
    assert len(set(rates(folder / stage))) > 3


def rates(folder: Path) -> list[str]:
    (file,) = folder.rglob("metrics.csv")
    return [row["lr-AdamW"] for row in csv.DictReader(file.open()) if row.get("lr-AdamW")]


@pytest.mark.parametrize("stage", STAGES)
def test_the_module_is_plain_afterwards_and_can_be_evaluated(found: dict[str, Any], stage: str) -> None:
    runs = found["fits"]
    assert runs[f"{stage} kinds"] == {"Parameter", "dict"}
    assert runs[f"{stage} predicted"].shape == (3, 1)
    (one,), (other,) = runs[f"{stage} after"], runs["1 after"]
    assert one == pytest.approx(other, abs=1e-6)
    (halfway,) = runs[f"{stage} from the file"]
    assert halfway["val"] != pytest.approx(one["val"], abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_resumes_exactly(found: dict[str, Any], resumed: dict[str, Any], stage: str) -> None:
    """In the middle of an epoch, in new processes."""
    run, wanted = resumed[f"{stage} in {stage}"], found["fits"][stage]
    same(run["weights"], wanted["weights"])
    assert run["metrics"] == wanted["metrics"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_resumes_in_another_stage(found: dict[str, Any], resumed: dict[str, Any], stage: str) -> None:
    same(resumed[f"{stage} in {int(stage) % 3 + 1}"]["weights"], found["fits"][stage]["weights"], 2e-6)


def test_a_file_resumes_in_ddp_and_is_in_plain_form(
    found: dict[str, Any], resumed: dict[str, Any], folder: Path
) -> None:
    same(resumed["3 in ddp"]["weights"], found["fits"]["3"]["weights"], 2e-6)
    checkpoint = torch.load(folder / "stage-3.ckpt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()} == {
        name: tuple(value.shape) for name, value in found["fits"]["3"]["weights"].items()
    }
    (optimizer,) = checkpoint["optimizer_states"]
    assert sorted(optimizer["state"]) == list(range(5))
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(optimizer["state"][0])


def test_a_killed_run_goes_on_exactly(found: dict[str, Any], resumed: dict[str, Any]) -> None:
    same(resumed["engine"]["weights"], found["fits"][RESUMED_STAGE]["weights"])
    assert resumed["engine"]["metrics"] == found["fits"][RESUMED_STAGE]["metrics"]


def test_one_process_takes_up_what_two_have_left(python: Path, folder: Path, found: dict[str, Any]) -> None:
    (run,) = peer_ranks.run(python, SCRIPT, "alone", folder, world=1)
    close(run["loaded"], torch.load(folder / "whole", weights_only=True), atol=0)
    same(run["3"], run["ddp"], 1e-6)
    assert run["emptied"] == {}


# ---- without the engine


@pytest.mark.skipif(has("deepspeed"), reason="deepspeed is in this environment")
@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_3_offload_nvme"])
def test_without_the_package_it_says_what_to_install(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install deepspeed"):
        make_strategy(name, Place(), "cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "has", lambda name: True)


@pytest.mark.usefixtures("installed")
def test_arguments_make_the_configuration() -> None:
    made = make_strategy("deepspeed_stage_3_offload_nvme", Place(), "cpu")
    zero = made.config["zero_optimization"]  # type: ignore[attr-defined]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {
        "device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 4, "pin_memory": False
    }  # fmt: skip
    assert zero["offload_param"]["max_in_cpu"] == 1_000_000_000
    assert made.config["aio"]["queue_depth"] == 8  # type: ignore[attr-defined]
    assert made.forward_is_collective
    second = deepspeed.DeepSpeedStrategy(
        reduce_bucket_size=7, overlap_comm=False, logging_batch_size_per_gpu=16
    )
    assert (
        second.config["zero_optimization"] | {"stage": 2, "reduce_bucket_size": 7, "overlap_comm": False}
        == (second.config["zero_optimization"])
    )
    assert second.config["train_micro_batch_size_per_gpu"] == 16
    assert not deepspeed.DeepSpeedStrategy(stage=1).forward_is_collective


@pytest.mark.usefixtures("installed")
def test_a_configuration_of_ones_own(tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
        "prescale": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    for config in (given, tmp_path / "config.json", os.fspath(tmp_path / "config.json")):
        made = deepspeed.DeepSpeedStrategy(config=config)
        assert made.config["zero_optimization"] == {"stage": 3}
        assert made.config["prescale"] == 1
    assert given["zero_optimization"] == {"stage": 3, "reduce_bucket_size": "auto"}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"stage": 4}, "stage: 4"), ({"offload_parameters": True}, "offload_parameters"),
     ({"offload_optimizer": True, "offload_optimizer_device": "gpu"}, "offload_optimizer_device: 'gpu'"),
     ({"config": "/nowhere/config.json"}, "config: cannot read"), ({"config": {"bf16": {}}}, "zero_optimization.stage"),
     ({"config": {"zero_optimization": {"stage": 2}, "optimizer": {}}}, "configure_optimizers"),
     ({"config": {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}}, "accumulate_grad_batches"),
     ({"config": {"zero_optimization": {"stage": 2}, "train_batch_size": 2}}, "train_batch_size")],
)  # fmt: skip
def test_a_wrong_argument_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        deepspeed.DeepSpeedStrategy(**arguments)


def test_precision_goes_into_the_configuration() -> None:
    plain, scaling = {"zero_optimization": {"stage": 2}}, {"loss_scale": 0, "hysteresis": 3}
    with_precision = deepspeed_config.with_precision
    assert with_precision(plain, "16-mixed", scaling)["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "hysteresis": 3,
    }
    assert with_precision(plain, "bf16-true", scaling)["bf16"] == {"enabled": True}
    assert with_precision(plain, "32-true", scaling) == plain
    own = {**plain, "fp16": {"enabled": True, "loss_scale": 128}}
    assert with_precision(own, "16-mixed", scaling) == own
    with pytest.raises(MisconfigurationException, match="'fp16' is enabled"):
        with_precision(own, "32-true", scaling)


class Scaler:
    """What DeepSpeed's DynamicLossScaler has."""

    dynamic, scale_factor, scale_window = True, 2.0, 1000
    cur_scale, cur_iter, last_overflow_iter, cur_hysteresis = 512.0, 40, 9, 2


def test_the_loss_scale_is_kept_and_can_go_on_without_deepspeed() -> None:
    precision = DeepSpeedPrecision("16-mixed")
    precision.load_state_dict({"scale": 4.0})  # no engine yet
    assert precision.state_dict() == {}
    precision.loss_scaler = Scaler()
    state = precision.state_dict()
    fresh = DeepSpeedPrecision("16-mixed")
    fresh.loss_scaler = Scaler()
    fresh.loss_scaler.cur_scale, fresh.loss_scaler.cur_iter = 1.0, 0
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(state)
    assert scaler.state_dict() == {
        "scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 1000, "_growth_tracker": 30
    }  # fmt: skip
    fresh.load_state_dict(scaler.state_dict())
    assert fresh.state_dict()["_growth_tracker"] == 30
