"""Names and arguments of strategies, ddp's numbers, and what ranks say to one another."""

from __future__ import annotations

import contextlib
import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer import strategy_cases as cases
from tests.trainer.forkhost import Host
from tests.trainer.strategy_ranks import Net, whole_run
from trainyard.accelerators import CPUAccelerator
from trainyard.environment import Place
from trainyard.errors import MisconfigurationException
from trainyard.plugins import MixedPrecision, TorchSyncBatchNorm
from trainyard.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    equip,
    make_strategy,
)
from trainyard.strategies.registry import STRATEGIES

SCRIPT = str(Path(__file__).with_name("strategy_ranks.py"))


def run_case(host: Host, folder: Path, case: str, world: int) -> list[Any]:
    """What the ranks have found."""
    folder.mkdir(exist_ok=True)
    ranks = host.run([SCRIPT, case, str(folder)], world=world, seconds=120)
    assert not any(rank.code for rank in ranks), "\n".join(rank.output[-3000:] for rank in ranks)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(world)]


def close(found: dict[str, Any], wanted: dict[str, Any], *, atol: float = 2e-6) -> None:
    """Two `whole_run`s have come to the same weights and optimizer states."""
    assert set(found["model"]) == set(wanted["model"])
    for name, value in wanted["model"].items():
        torch.testing.assert_close(
            found["model"][name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    if "optimizer" not in wanted:
        return
    assert found["optimizer"]["param_groups"] == wanted["optimizer"]["param_groups"]
    for index, state in wanted["optimizer"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(found["optimizer"]["state"][index][key], value, atol=atol, rtol=0)


# ---- names


@pytest.mark.parametrize(
    ("name", "kind", "launch"),
    [("auto", SingleDeviceStrategy, None), ("single_device", SingleDeviceStrategy, None),
     ("ddp", DDPStrategy, "popen"), ("ddp_spawn", DDPStrategy, "spawn"), ("ddp_fork", DDPStrategy, "fork"),
     ("ddp_notebook", DDPStrategy, "fork"), ("ddp_find_unused_parameters_true", DDPStrategy, "popen"),
     ("ddp_spawn_find_unused_parameters_false", DDPStrategy, "spawn"), ("fsdp", FSDPStrategy, "popen"),
     ("fsdp_cpu_offload", FSDPStrategy, "popen")],
)  # fmt: skip
def test_names(name: str, kind: type[Strategy], launch: str | None) -> None:
    made = make_strategy(name, Place(), "cpu")
    assert type(made) is kind
    assert made.launch == launch
    assert isinstance(made.kind, CPUAccelerator)


def test_every_name_makes_a_strategy() -> None:
    for name in STRATEGIES:
        with contextlib.suppress(ModuleNotFoundError):  # of a package that is not in this environment
            assert isinstance(make_strategy(name, Place(), "cpu"), Strategy)


def test_arguments_of_names() -> None:
    for name, unused in (("true", True), ("false", False)):
        made = make_strategy(f"ddp_fork_find_unused_parameters_{name}", Place(), "cpu")
        assert isinstance(made, DDPStrategy)
        assert made._kwargs["find_unused_parameters"] is unused
    offload = make_strategy("fsdp_cpu_offload", Place(), "cpu")
    assert isinstance(offload, FSDPStrategy)
    assert offload.cpu_offload


def test_auto_is_ddp_for_several_processes() -> None:
    several = Place(rank=1, local_rank=1, world_size=2, local_world_size=2, launched=True)
    assert type(make_strategy("auto", several, "cpu")) is DDPStrategy
    assert type(make_strategy("auto", Place(), "cpu", processes=2)) is DDPStrategy


@pytest.mark.parametrize(
    ("name", "said"),
    [("dpp", "did you mean 'ddp'"), ("fsdp_offload", "'fsdp_cpu_offload'"), ("ddp_find_unused", "'ddp_find_unused_param"),
     ("zzz", "strategy: 'zzz' is none of 'auto', 'single_device'")],
)  # fmt: skip
def test_unknown_names_get_the_nearest(name: str, said: str) -> None:
    with pytest.raises(MisconfigurationException, match="strategy: ") as error:
        make_strategy(name, Place(), "cpu")
    assert said in str(error.value)


def test_one_device_and_several_processes() -> None:
    with pytest.raises(MisconfigurationException, match="single_device, but torchrun started 2 processes"):
        make_strategy("single_device", Place(world_size=2, launched=True), "cpu")


# ---- arguments


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [(DDPStrategy, {"find_unused_params": True}, "find_unused_params: .*did you mean 'find_unused_parameters'|skip_all"),
     (DDPStrategy, {"bucket_cap": 3}, "bucket_cap: .*did you mean 'bucket_cap_mb'"),
     (DDPStrategy, {"start_method": "thread"}, "start_method: 'thread' is none of popen, spawn"),
     (DDPStrategy, {"timeout": 30}, "timeout: 30 is not a datetime.timedelta"),
     (DDPStrategy, {"model_averaging_period": 2}, "model_averaging_period: "),
     (DDPStrategy, {"ddp_comm_state": 1}, "ddp_comm_state: it does nothing without ddp_comm_hook"),
     (DDPStrategy, {"parallel_devices": [0]}, r"parallel_devices: DDPStrategy .* use Trainer\(devices"),
     (DDPStrategy, {"checkpoint_io": object()}, "checkpoint_io: "),
     (FSDPStrategy, {"sharding_strategy": "FULL"}, "sharding_strategy: 'FULL' is none of FULL_SHARD"),
     (FSDPStrategy, {"state_dict_type": "local"}, "state_dict_type: 'local' is neither"),
     (FSDPStrategy, {"wrap_policy": {Net}}, "wrap_policy: FSDPStrategy does not take it"),
     (FSDPStrategy, {"device_mesh": (2, 1)}, r"device_mesh: \(replicas, shards\) has a meaning with"),
     (FSDPStrategy, {"activation_checkpointing": {Net}, "activation_checkpointing_policy": {Net}}, "old name of"),
     (ModelParallelStrategy, {"data_parallel_size": 0}, "data_parallel_size: 0 is neither a positive"),
     (ModelParallelStrategy, {"tensor_parallel_size": "all"}, "tensor_parallel_size: 'all' is neither")],
)  # fmt: skip
def test_arguments_that_cannot_be(kind: type[Strategy], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(MisconfigurationException, match=said):
        kind(**arguments)


def test_arguments_of_lightnings_fsdp() -> None:
    from torch.distributed.fsdp import CPUOffload, ShardingStrategy

    made = FSDPStrategy(
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, cpu_offload=CPUOffload(offload_params=True),
        use_orig_params=True, limit_all_gathers=False, timeout=timedelta(minutes=2),
    )  # fmt: skip
    assert (made.sharding_strategy, made.cpu_offload) == ("SHARD_GRAD_OP", True)
    assert made.timeout == timedelta(minutes=2)


def test_whole_files_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for make in (
        lambda: FSDPStrategy(state_dict_type="sharded"),
        lambda: ModelParallelStrategy(save_distributed_checkpoint=True),
    ):
        make()
        assert "checkpoint files are whole all the same" in caplog.text
        caplog.clear()
    FSDPStrategy()
    ModelParallelStrategy()
    assert not caplog.text


def test_given_precision_and_accelerator_win() -> None:
    precision, accelerator = MixedPrecision("bf16-mixed"), CPUAccelerator()
    made = make_strategy(DDPStrategy(precision_plugin=precision, accelerator=accelerator), Place(), "auto")
    assert made.precision is made.given_precision is precision  # type: ignore[attr-defined]
    assert made.kind is accelerator


@pytest.mark.parametrize(
    ("precision", "plugins", "given"),
    [
        ("bf16", [], None),
        (None, [MixedPrecision("bf16-mixed")], None),
        (None, [], MixedPrecision("bf16-mixed")),
    ],
)
def test_precision_comes_from_one_place(precision: Any, plugins: list[Any], given: Any) -> None:
    strategy = DDPStrategy(precision_plugin=given)
    equip(strategy, precision, plugins)
    assert strategy.precision.name == "bf16-mixed"
    with pytest.raises(MisconfigurationException, match=r" and plugins\[\d\]: each of them says"):
        equip(strategy, precision, [*plugins, MixedPrecision("16-mixed")])


def test_layers_are_synchronised_by_one() -> None:
    strategy, sync = DDPStrategy(), TorchSyncBatchNorm()
    equip(strategy, None, [sync], sync_batchnorm=True)
    assert strategy.layer_sync is sync
    equip(strategy, None, [], sync_batchnorm=True)
    assert isinstance(strategy.layer_sync, TorchSyncBatchNorm)
    equip(strategy, None)
    assert strategy.layer_sync is None
    with pytest.raises(MisconfigurationException, match="one LayerSync only"):
        equip(strategy, None, [sync, TorchSyncBatchNorm()])


# ---- one process


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_world_of_one_needs_no_launcher(name: str) -> None:
    assert not torch.distributed.is_initialized()
    try:
        found = whole_run(name, steps=3)
        assert torch.distributed.get_world_size() == 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    wanted = whole_run("single_device", steps=3)
    close(found, wanted, atol=0)
    assert found["losses"] == wanted["losses"]


def test_one_process_has_nobody_to_ask() -> None:
    alone = make_strategy("auto", Place(), "cpu")
    value = torch.tensor([2.0])
    assert alone.reduce(value) is value
    assert alone.broadcast("x", src=0) == "x"
    assert alone.reduce_boolean_decision(True)
    assert not alone.reduce_boolean_decision(False, all=False)
    with pytest.raises(MisconfigurationException, match="reduce_op: 'median' is none of mean"):
        alone.reduce(value, reduce_op="median")


def test_layers_without_weights_are_not_initialised() -> None:
    alone = make_strategy("auto", Place(), "cpu")
    before = torch.get_rng_state()
    with alone.init_context(empty_init=True):
        nn.Linear(64, 64)
    assert torch.equal(before, torch.get_rng_state())
    with alone.init_context():
        nn.Linear(64, 64)
    assert not torch.equal(before, torch.get_rng_state())


def test_a_module_on_the_meta_device_is_made_on_one_device() -> None:
    module = Net()
    with torch.device("meta"):
        module.configure_model()
    module.offset = torch.tensor(0.5)  # buffers of the module itself have no reset_parameters
    module.steps = torch.zeros(1, dtype=torch.int64)
    module.scale = nn.Parameter(torch.ones(3))
    alone = make_strategy("auto", Place(), "cpu")
    alone.setup(module, training=True)
    assert not any(p.is_meta for p in module.parameters())
    assert module.tied.weight is module.head.weight
    assert module.loss(torch.randn(3, 5)).item() > 0


# ---- numbers


@pytest.fixture(scope="module")
def numbers(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """All variants, at worlds of 2 and 3."""
    folder = tmp_path_factory.mktemp("numbers")
    return {world: run_case(host, folder / str(world), "all_variants", world)[0] for world in (2, 3)}


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    """What one process comes to with the same global batches."""
    plain = whole_run("single_device")
    accumulated = whole_run("single_device", steps=2, accumulate=2)
    clipped = whole_run("single_device", clip=(0.1, "norm"))
    return {
        "clip": clipped, "accumulate": accumulated, "": plain, "clip value": whole_run("single_device", clip=(0.01, "value")),
        "accumulate and clip": whole_run("single_device", steps=2, accumulate=2, clip=(0.1, "norm")),
    }  # fmt: skip


def reference(name: str) -> str:
    if name == "fsdp, accumulate":
        return "accumulate and clip"
    option = name.partition(", ")[2]
    return option if option in ("clip", "clip value", "accumulate") else ""


@pytest.mark.parametrize(
    ("world", "name"), [*((2, name) for name in cases.variants()), *((3, name) for name in cases.AT_THREE)]
)
def test_ranks_come_to_what_one_process_comes_to(
    numbers: dict[int, dict[str, Any]], wanted: dict[str, Any], world: int, name: str
) -> None:
    """With uneven shards (sizes that are no multiple of the world), tied weights, clipping, accumulation."""
    found, expected = numbers[world][name], wanted[reference(name)]
    close(found, expected)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert all(torch.equal(found["after"][n], value) for n, value in found["model"].items())


def test_clipping_and_accumulation_make_a_difference(wanted: dict[str, Any]) -> None:
    ends = [
        tuple(round(float(v.double().sum()), 4) for v in run["model"].values()) for run in wanted.values()
    ]
    assert len(set(ends)) == len(ends)


def test_fsdp_is_bit_stable(numbers: dict[int, dict[str, Any]]) -> None:
    for world in (2, 3):
        close(numbers[world]["fsdp again"], numbers[world]["fsdp"], atol=0)
    close(numbers[2]["fsdp"], numbers[2]["ddp"], atol=0)  # one addition of two numbers has one order only


def test_manual_optimization(host: Host, tmp_path: Path) -> None:
    """Two backward passes and two optimizers within one training_step."""
    wanted = cases.manual_run("single_device")
    found = run_case(host, tmp_path, "manual", 2)[0]
    for name in ("ddp", "ddp unused", "fsdp"):
        close(found[name], wanted)


def test_between_ranks(host: Host, tmp_path: Path) -> None:
    zero, one = run_case(host, tmp_path, "between_ranks", 2)
    for found in (zero, one):
        assert found["broadcast 0"] == {"from": 0}
        assert found["broadcast 1"] == [1, {1, 2}]
        ops = [value.tolist() for value in found["reduce"].values()]
        assert ops == [[1.5, -1], [1.5, -1], [3, -2], [1, -2], [2, 0], [2, 0], [3, -2]]
        assert found["no tensor"] == "text"
        assert found["integers"].tolist() == [1.5, 2.5]
        assert found["gathered"].tolist() == [[1, 0], [2, -2]]
        assert found["all"] == [False, True]
        assert found["any"] == [True, False]
    assert (zero["gradient"].tolist(), one["gradient"].tolist()) == ([3, 6], [9, 12])
    assert one["untouched"].tolist() == [2, -2]
    sampler = {"num_replicas": 2, "rank": 1}
    assert one["who"] == (2, 1, 1, 0, 1, 2, False, True, "cpu", sampler, 2)


def test_communication_hook(host: Host, tmp_path: Path) -> None:
    found = run_case(host, tmp_path, "comm_hook", 2)[0]
    assert found["calls"][:2] == ["wrapper", "hook"]
    close(found["run"], whole_run("single_device", steps=2))


# ---- batch normalisation


def test_synchronised_batch_normalisation(host: Host, tmp_path: Path) -> None:
    """Statistics are those of the whole batch, in the forward and in the backward pass."""
    wanted = whole_run("single_device", batch_norm=True)
    found = run_case(host, tmp_path, "sync_batchnorm", 2)[0]
    for name in ("ddp", "fsdp"):
        close(found[name], wanted)
        assert found[name]["after"]["norm.num_batches_tracked"] == 4
        torch.testing.assert_close(
            found[name]["after"]["norm.running_var"], wanted["model"]["norm.running_var"]
        )


@pytest.mark.parametrize("on_cpu", [False, True])
def test_layers_are_put_back(on_cpu: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm2d(2, affine=False)))
    before, names = list(module.modules()), list(module.state_dict())
    first = copy.deepcopy(module.state_dict())
    sync = TorchSyncBatchNorm()
    sync.on_cpu = on_cpu
    sync.apply(module)
    for part in (module[1], module[2][0]):
        assert isinstance(part, nn.modules.batchnorm._BatchNorm)
        assert isinstance(part, nn.SyncBatchNorm) is not on_cpu
    assert list(module.state_dict()) == names
    with torch.no_grad():
        module[1].weight.fill_(3)
        module[1].running_mean.fill_(2)
    sync.revert(module)
    assert all(a is b for a, b in zip(module.modules(), before, strict=True))
    assert module[1].weight.tolist() == [3.0] * 4
    assert module[1].running_mean.tolist() == [2.0] * 4
    assert torch.equal(module.state_dict()["0.weight"], first["0.weight"])
