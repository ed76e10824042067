"""Sharded for real: what each rank holds, in which precision, and what becomes of it in checkpoints and afterwards."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, size_based_auto_wrap_policy

from tests.trainer import strategy_cases as cases
from tests.trainer.forkhost import Host
from tests.trainer.strategy_ranks import Block, Net, whole_run
from tests.trainer.test_strategies import close, run_case
from trainyard.errors import MisconfigurationException
from trainyard.strategies.materialize import materialize
from trainyard.strategies.wrapping import chosen, shardable

# ---- which modules are sharded as one


def model() -> Net:
    made = Net()
    made.configure_model()
    return made


def names(root: nn.Module, picked: list[nn.Module]) -> list[str]:
    known = {module: name for name, module in root.named_modules()}
    return [known[module] for module in picked]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ({Block}, ["body.2", "body.1"]),
        ([Block], ["body.2", "body.1"]),
        (Block, ["body.2", "body.1"]),
        (ModuleWrapPolicy({Block}), ["body.2", "body.1"]),
        (lambda module: isinstance(module, nn.LayerNorm), ["body.2.norm", "body.1.norm"]),
        (CustomPolicy(lambda module: isinstance(module, nn.LayerNorm)), ["body.2.norm", "body.1.norm"]),
        (functools.partial(size_based_auto_wrap_policy, min_num_params=60), ["body.1", "body.2"]),
        (None, []),
    ],
    ids=["set", "list", "class", "ModuleWrapPolicy", "predicate", "CustomPolicy", "size", "default"],
)
def test_policies(policy: Any, wanted: list[str]) -> None:
    root = model()
    assert names(root, shardable(root, policy)) == wanted


def test_default_policy_takes_blocks_and_large_modules() -> None:
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.TransformerEncoderLayer(128, 4) for _ in range(2))
        tower = nn.Sequential(nn.Linear(4000, 2000), nn.Linear(2000, 2000))
        root = nn.ModuleDict({"blocks": blocks, "tower": tower, "small": nn.Sequential(nn.Linear(9, 9))})
        root["table"] = nn.Embedding(50_000, 512)  # a single layer, however large: its weight may be tied
    assert names(root, chosen(root, None, "auto_wrap_policy")) == ["blocks.0", "blocks.1", "tower"]


def test_what_shares_parameters_stays_together() -> None:
    """A group gathers its own parameters only: a tied one would be a shard when the other layer computes."""
    root = model()
    assert names(root, shardable(root, {nn.Linear})) == ["body.2.linear", "body.1.linear", "body.0"]


def test_a_policy_of_what_is_no_module() -> None:
    with pytest.raises(MisconfigurationException, match="auto_wrap_policy: 'Block' is no class of modules"):
        shardable(model(), {"Block"})  # type: ignore[arg-type]


# ---- what each rank holds


def test_each_rank_holds_its_share(host: Host, tmp_path: Path) -> None:
    found = run_case(host, tmp_path, "shards", 2)
    whole = {name: tuple(p.shape) for name, p in model().named_parameters()}
    held = [0, 0]
    for name, shape in whole.items():
        parts = [rank["parameters"][name] for rank in found]
        first = [-(-shape[0] // 2), shape[0] // 2]
        for rank, (full, local, nbytes, placements) in enumerate(parts):
            assert full == shape
            assert local == (first[rank], *shape[1:])
            assert placements == "(Shard(dim=0),)"
            held[rank] += nbytes
        for rank in range(2):
            assert found[rank]["moments"][name] == (shape, parts[rank][1])  # so do the optimizer's states
    total = sum(4 * torch.Size(shape).numel() for shape in whole.values())
    # Storage, not only what is seen of it; a shard is padded to the size of the largest.
    assert max(held) < 0.65 * total
    for rank in found:
        assert all(rank["gradients"].values())
        assert rank["same object"]
        assert rank["units"] == ["", "body.1", "body.2"]


def test_hybrid_replicates_between_groups_and_shards_within(host: Host, tmp_path: Path) -> None:
    found = run_case(host, tmp_path, "hybrid", 4)
    close(found[0], whole_run("single_device"))
    for name, value in found[0]["local"].items():
        assert torch.equal(value, found[2]["local"][name])
        assert torch.equal(found[1]["local"][name], found[3]["local"][name])
        assert value.numel() + found[1]["local"][name].numel() == found[0]["model"][name].numel()


# ---- made on the meta device


def test_layers_made_on_the_meta_device(host: Host, tmp_path: Path) -> None:
    """configure_model allocates nothing, whatever the world is the model starts from the same weights."""
    two, three = (run_case(host, tmp_path / str(n), "on_meta", n) for n in (2, 3))
    assert two[0]["meta"] >= {"head.weight", "body.1.linear.weight"}
    assert two[0]["tied"]
    assert list(two[0]["start"]) == list(three[0]["start"])
    for name, value in two[0]["start"].items():
        assert torch.equal(value, three[0]["start"][name]), name
    bound = 7**-0.5
    head = two[0]["start"]["head.weight"]
    assert 0.5 * bound < head.abs().max() <= bound
    assert not two[0]["start"]["attention.out_proj.bias"].any()
    assert two[0]["losses"] == pytest.approx(three[0]["losses"], rel=1e-5)


def test_layers_that_cannot_say_how_they_begin() -> None:
    module = nn.Sequential(nn.Linear(2, 2), cases.Custom()).to("meta")
    with pytest.raises(
        MisconfigurationException, match=r"1 \(Custom\) is on the meta device, and has no reset_param"
    ):
        materialize(module, torch.device("cpu"))


def test_materialized_layers_are_those_made_at_once() -> None:
    torch.manual_seed(3)
    wanted = nn.TransformerEncoderLayer(8, 2)
    torch.manual_seed(3)
    with torch.device("meta"):
        module = nn.TransformerEncoderLayer(8, 2)
    materialize(module, torch.device("cpu"))
    assert module.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert module.state_dict()[name].std() == pytest.approx(value.std().item(), rel=0.3, abs=1e-9), name


# ---- precision


@pytest.fixture(scope="module")
def precisions(host: Host, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = run_case(host, tmp_path_factory.mktemp("precisions"), "precisions", 2)[0]
    return found


@pytest.mark.parametrize("name", cases.PRECISIONS)
def test_precisions(precisions: dict[str, Any], name: str) -> None:
    """Not bit by bit: ddp averages gradients of 32 bit weights, fsdp gathers the weights in 16."""
    wanted = whole_run("single_device", precision=name, clip=(0.1, "norm"))
    atol = 1e-12 if name == "64-true" else 0.1
    close_weights(precisions[f"ddp {name}"], wanted, atol)
    normed = whole_run("single_device", precision=name, clip=(0.1, "norm"), batch_norm=True)
    close_weights(precisions[f"fsdp {name}"], normed, atol)
    dtypes = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
    stored = precisions[f"fsdp {name}"]["model"]["head.weight"].dtype
    assert stored == dtypes.get(name, torch.float32)
    close(precisions[f"fsdp {name} again"], precisions[f"fsdp {name}"], atol=0)


def close_weights(found: dict[str, Any], wanted: dict[str, Any], atol: float) -> None:
    for name, value in wanted["model"].items():
        torch.testing.assert_close(
            found["model"][name], value, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found["losses"] == pytest.approx(wanted["losses"], rel=max(atol, 1e-9))


def test_layers_are_gathered_in_16_bit(host: Host, tmp_path: Path) -> None:
    for found in run_case(host, tmp_path, "gathered_dtypes", 2):
        assert found["seen"] == {"body.1": {torch.bfloat16}, "norm": {torch.float32}}
        assert found["stored"] == {torch.float32}


def test_one_ranks_inf_is_everybodys(host: Host, tmp_path: Path) -> None:
    zero, one = run_case(host, tmp_path, "scaler_and_one_inf", 2)
    assert zero["same"]
    assert one["same"]
    assert zero["scale"] == one["scale"]
    assert zero["scale"]["scale"] == 2.0**15


# ---- state


def test_state_is_whole_and_goes_on_anywhere(host: Host, tmp_path: Path) -> None:
    """Saved by two ranks; resumed by one, two and three, and by strategies that do not shard."""
    saved = run_case(host, tmp_path / "saved", "train_and_save", 2)
    half, end = saved[0]["half"], saved[0]["end"]
    assert saved[1]["half"] == {"model": {}, "optimizer": {}}  # a rank does not hold what it does not write
    plain = model()
    assert list(half["model"]) == list(plain.state_dict())
    plain.load_state_dict(half["model"])
    torch.optim.Adam(plain.parameters(), 0.05).load_state_dict(half["optimizer"])
    for world in (2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        torch.save(half, folder / "half")
        found = run_case(host, folder, "go_on", world)[0]
        for name in ("fsdp", "ddp"):
            close(found[name], end, atol=0 if world == 2 else 2e-6)
    close(cases.resume("single_device", half), end)


def test_state_of_one_process_goes_on_sharded(host: Host, tmp_path: Path) -> None:
    half = whole_run("single_device", steps=2)
    torch.save({"model": half["model"], "optimizer": half["optimizer"]}, tmp_path / "half")
    found = run_case(host, tmp_path, "go_on", 2)[0]
    close(found["fsdp"], whole_run("single_device"))


# ---- afterwards


def test_the_module_is_itself_again_after_a_run(host: Host, tmp_path: Path) -> None:
    ranks = run_case(host, tmp_path, "after_a_run", 2)
    for found in ranks:
        for round_ in ("first", "second"):
            after = found[round_]
            assert after["kinds"]
            assert after["were others"]
            assert after["plain"]
            assert after["tied"]
            assert after["hooks"] == 0
            assert after["left"] == []
        assert found["copied"]
        assert found["trains alone"]
        assert found["second losses"][-1] != found["first losses"][-1]
        for name, value in ranks[0]["second"]["state"].items():
            assert torch.equal(value, found["second"]["state"][name])
