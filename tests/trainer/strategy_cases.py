"""Cases of strategy_ranks.py. Reference runs of one process are made with the same functions by the tests."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.utils.data import DataLoader

import trainyard as L
from tests.trainer.models import numbers
from tests.trainer.strategy_ranks import (
    Block,
    Net,
    connected,
    prepared,
    result,
    share,
    train,
    whole_run,
)
from trainyard.errors import MisconfigurationException
from trainyard.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

PRECISIONS = ("64-true", "bf16-mixed", "16-mixed", "bf16-true")


# ---- numbers


def variants() -> dict[str, Any]:
    """Runs that must all come to what one process comes to with the whole batch."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {
        "ddp": lambda: whole_run(DDPStrategy()),
        "ddp static": lambda: whole_run(DDPStrategy(static_graph=True, bucket_cap_mb=1)),
        "ddp unused": lambda: whole_run("ddp_find_unused_parameters_true"),
        "ddp, clip": lambda: whole_run(DDPStrategy(), clip=(0.1, "norm")),
        "ddp, accumulate": lambda: whole_run(DDPStrategy(), steps=2, accumulate=2),
        "fsdp": lambda: whole_run(FSDPStrategy(auto_wrap_policy={Block})),
        "fsdp again": lambda: whole_run(FSDPStrategy(auto_wrap_policy={Block})),
        "fsdp, one unit": lambda: whole_run("fsdp", validate=True),
        "fsdp, grad op": lambda: whole_run(
            FSDPStrategy(auto_wrap_policy={Block}, sharding_strategy="SHARD_GRAD_OP"), validate=True
        ),
        "fsdp, hybrid": lambda: whole_run(
            FSDPStrategy(auto_wrap_policy={Block}, sharding_strategy="HYBRID_SHARD", device_mesh=(world, 1))
        ),
        "fsdp, none": lambda: whole_run(FSDPStrategy(sharding_strategy="NO_SHARD")),
        "fsdp, recompute": lambda: whole_run(
            FSDPStrategy(auto_wrap_policy={Block}, activation_checkpointing_policy={Block, nn.Linear})
        ),
        "fsdp, cpu offload": lambda: whole_run("fsdp_cpu_offload"),
        "fsdp, clip": lambda: whole_run(FSDPStrategy(auto_wrap_policy={Block}), clip=(0.1, "norm")),
        "fsdp, clip value": lambda: whole_run(FSDPStrategy(auto_wrap_policy={Block}), clip=(0.01, "value")),
        "fsdp, accumulate": lambda: whole_run(
            FSDPStrategy(auto_wrap_policy={Block}), steps=2, accumulate=2, clip=(0.1, "norm")
        ),
    }


AT_THREE = ("ddp", "fsdp", "fsdp again", "fsdp, none", "fsdp, clip", "fsdp, accumulate")


def all_variants() -> dict[str, Any]:
    """At a world of three only where three can differ from two."""
    strategy = connected("ddp")
    every = strategy.world_size == 2
    return {name: run() for name, run in variants().items() if every or name in AT_THREE}


def precisions() -> dict[str, Any]:
    connected("ddp")
    found = {}
    for name in PRECISIONS:
        found[f"ddp {name}"] = whole_run("ddp", precision=name, clip=(0.1, "norm"))
        strategy = FSDPStrategy(auto_wrap_policy={Block})
        found[f"fsdp {name}"] = whole_run(strategy, precision=name, clip=(0.1, "norm"), batch_norm=True)
        found[f"fsdp {name} again"] = whole_run(
            FSDPStrategy(auto_wrap_policy={Block}), precision=name, clip=(0.1, "norm"), batch_norm=True
        )
    return found


def gathered_dtypes() -> dict[str, Any]:
    """What layers compute with under bf16-mixed."""
    strategy = connected(FSDPStrategy(auto_wrap_policy={Block}), "bf16-mixed")
    module = Net(batch_norm=True)
    prepared(strategy, module)
    seen = {}
    for name in ("body.1", "norm"):
        part = module.get_submodule(name)
        part.register_forward_pre_hook(
            lambda part, args, name=name: seen.update({name: {p.dtype for p in part.parameters()}})
        )
    with strategy.precision.forward_context(strategy.device):
        strategy.step(module, "training_step")(share(strategy, 0), 0)
    return {"seen": seen, "stored": {p.dtype for p in module.parameters()}}


def scaler_and_one_inf() -> dict[str, Any]:
    """Rank 1 alone has an inf: both must leave the step out."""
    strategy = connected(FSDPStrategy(), "16-mixed")
    module = Net()
    optimizer = prepared(strategy, module)
    before = copy.deepcopy(strategy.model_state(module))

    def closure() -> torch.Tensor:
        with strategy.precision.forward_context(strategy.device):
            loss = strategy.step(module, "training_step")(share(strategy, 0), 0)
        strategy.backward(module, strategy.precision.scale(loss))
        if strategy.global_rank == 1:
            module.scale.grad.to_local().fill_(float("inf"))
        strategy.precision.unscale(optimizer)
        return loss

    strategy.optimizer_step(optimizer, closure)
    after = strategy.model_state(module)
    # steps is a counter that a forward raises
    same = {name for name in before if torch.equal(before[name], after[name])} | {"steps"}
    return {
        "same": strategy.is_global_zero is False or same == set(before),
        "scale": strategy.precision.state_dict(),
    }


# ---- shards


def shards() -> dict[str, Any]:
    strategy = connected(FSDPStrategy(auto_wrap_policy={Block}))
    module = Net()
    optimizer = prepared(strategy, module)
    train(strategy, module, optimizer, range(1))

    def seen(tensor: Any) -> Any:
        local = tensor.to_local()
        return (
            tuple(tensor.shape), tuple(local.shape), local.untyped_storage().nbytes(), str(tensor.placements)
        )  # fmt: skip

    return {
        "parameters": {name: seen(p) for name, p in module.named_parameters()},
        "gradients": {
            name: p.grad is None or seen(p.grad)[1] == seen(p)[1] for name, p in module.named_parameters()
        },
        "moments": {name: seen(optimizer.state[p]["exp_avg"])[:2] for name, p in module.named_parameters()},
        "same object": module.tied.weight is module.head.weight,
        "units": sorted(name for name, part in module.named_modules() if hasattr(part, "unshard")),
    }


def hybrid() -> dict[str, Any]:
    """World 4 as 2 replicas of 2 shards."""
    strategy = connected(FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2)))
    module = Net()
    optimizer = prepared(strategy, module)
    losses = train(strategy, module, optimizer, range(4))
    local = {name: p.to_local().clone() for name, p in module.named_parameters()}
    return result(strategy, module, optimizer, losses=losses, local=local)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Attentive(Net):
    def configure_model(self) -> None:
        super().configure_model()
        self.attention = nn.MultiheadAttention(7, 1)
        self.attention.requires_grad_(False)
        self.on_meta = {name for name, p in self.named_parameters() if p.is_meta}

    def reset_parameters(self) -> None:
        """Of what is the module's own."""
        with torch.no_grad():
            self.scale.fill_(1)
            self.offset.fill_(0.5)
            self.steps.zero_()


def on_meta() -> dict[str, Any]:
    strategy = connected(FSDPStrategy(auto_wrap_policy={Block}, init_on_meta=True))
    module = Attentive()
    optimizer = prepared(strategy, module, seed=strategy.global_rank)  # rank 0's weights count
    start = strategy.model_state(module)
    tied = module.tied.weight is module.head.weight
    losses = train(strategy, module, optimizer, range(3))
    return {"start": start, "losses": losses, "meta": module.on_meta, "tied": tied}


def after_a_run() -> dict[str, Any]:
    """The module is what it was, and can be trained, copied and saved again."""
    strategy = connected(FSDPStrategy(auto_wrap_policy={Block}, activation_checkpointing_policy={Block}))
    module = Net()
    kinds = None
    found: dict[str, Any] = {}
    for round_ in ("first", "second"):
        optimizer = prepared(strategy, module)
        inside = {type(part) for part in module.modules()}
        found[f"{round_} losses"] = train(strategy, module, optimizer, range(2), validate=True)
        strategy.teardown(module)
        if kinds is None:
            kinds = [type(part) for part in Net_parts()]
        found[round_] = {
            "kinds": [type(part) for part in module.modules()] == kinds,
            "were others": inside != set(kinds),
            "plain": all(type(p) is nn.Parameter for p in module.parameters()),
            "tied": module.tied.weight is module.head.weight,
            "hooks": sum(len(p._forward_hooks) + len(p._forward_pre_hooks) for p in module.modules()),
            "left": sorted(
                key for p in module.modules() for key in vars(p) if "fsdp" in key or "sharded" in key
            ),
            "state": {name: value.clone() for name, value in module.state_dict().items()},
        }
    twin = copy.deepcopy(module)
    found["copied"] = bool(torch.equal(twin(share(strategy, 0)), module(share(strategy, 0))))
    twin.loss(share(strategy, 0)).backward()
    found["trains alone"] = all(p.grad is not None for p in twin.parameters())
    return found


def Net_parts() -> list[nn.Module]:
    module = Net()
    module.configure_model()
    return list(module.modules())


# ---- state


def train_and_save() -> dict[str, Any]:
    strategy = connected(FSDPStrategy(auto_wrap_policy={Block}))
    module = Net()
    optimizer = prepared(strategy, module)
    train(strategy, module, optimizer, range(2))
    half = copy.deepcopy(result(strategy, module, optimizer))  # as state_dict() does, it shares memory
    train(strategy, module, optimizer, range(2, 4))
    return {"half": half, "end": result(strategy, module, optimizer)}


def resume(strategy: Any, state: dict[str, Any]) -> dict[str, Any]:
    strategy = connected(strategy)
    module = Net()
    optimizer = prepared(strategy, module, seed=99)
    strategy.load_model_state(module, state["model"])
    strategy.load_optimizer_state(module, optimizer, copy.deepcopy(state["optimizer"]))
    train(strategy, module, optimizer, range(2, 4))
    return result(strategy, module, optimizer)


def go_on() -> dict[str, Any]:
    """From the file `half` beside the results."""
    half = torch.load(Path(sys.argv[2]) / "half", weights_only=True)
    connected("ddp")
    return {"fsdp": resume(FSDPStrategy(auto_wrap_policy={Block}), half), "ddp": resume("ddp", half)}


# ---- manual optimization


class Adversaries(Net):
    """Two optimizers, two backward passes in one step."""

    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        raise NotImplementedError

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:  # type: ignore[override]
        strategy, one, two = self.parts
        for optimizer, sign in ((one, 1.0), (two, -0.5)):
            loss = sign * self.loss(batch)
            optimizer.zero_grad()
            strategy.backward(self, loss)
            strategy.optimizer_step(optimizer, lambda: None)


def manual_run(strategy: Any) -> dict[str, Any]:
    strategy = connected(strategy)
    module = Adversaries()
    torch.manual_seed(7)
    module.configure_model()
    strategy.setup(module, training=True)
    strategy.begin_manual(module)
    body = torch.optim.SGD([p for n, p in module.named_parameters() if "body" in n], 0.1)
    rest = torch.optim.SGD([p for n, p in module.named_parameters() if "body" not in n], 0.1)
    object.__setattr__(module, "parts", (strategy, *strategy.setup_optimizers(module, [body, rest])))
    run = strategy.step(module, "training_step")
    for number in range(3):
        run(share(strategy, number), number)
    return {"model": strategy.model_state(module)}


def manual() -> dict[str, Any]:
    connected("ddp")
    return {
        "ddp": manual_run("ddp"),
        "ddp unused": manual_run("ddp_find_unused_parameters_true"),
        "fsdp": manual_run(FSDPStrategy(auto_wrap_policy={Block})),
    }


# ---- between the ranks


def gradient_of_gathered(strategy: Any, mine: torch.Tensor) -> Any:
    """Each rank's loss uses what all have."""
    mine = mine.clone().requires_grad_()
    assert not strategy.all_gather(mine).requires_grad
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (1 + strategy.global_rank)
    (strategy.all_gather(mine, sync_grads=True) * weights).sum().backward()
    return mine.grad


def between_ranks() -> dict[str, Any]:
    strategy = connected("ddp")
    rank = strategy.global_rank
    mine = torch.tensor([1.0 + rank, -2.0 * rank])
    strategy.barrier("a name")
    return {
        "broadcast 0": strategy.broadcast({"from": rank}),
        "broadcast 1": strategy.broadcast([rank, {1, 2}], src=1),
        "reduce": {
            str(op): strategy.reduce(mine, reduce_op=op)
            for op in ("mean", "avg", "SUM", "min", "max", "product", torch.distributed.ReduceOp.SUM)
        },
        "no tensor": strategy.reduce("text"),
        "integers": strategy.reduce(torch.tensor([1, 2]) + rank, None, "mean"),
        "untouched": mine,
        "gathered": strategy.all_gather(mine),
        "gradient": gradient_of_gathered(strategy, mine),
        "all": [
            strategy.reduce_boolean_decision(rank == 0), strategy.reduce_boolean_decision(True)
        ],
        "any": [
            strategy.reduce_boolean_decision(rank == 0, all=False), strategy.reduce_boolean_decision(False, all=False)
        ],
        "who": (
            strategy.world_size, strategy.global_rank, strategy.local_rank, strategy.node_rank,
            strategy.num_nodes, strategy.num_processes, strategy.is_global_zero, strategy.is_distributed,
            str(strategy.root_device), strategy.distributed_sampler_kwargs, len(strategy.parallel_devices),
        ),
    }  # fmt: skip


def comm_hook() -> dict[str, Any]:
    calls: list[str] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations
        state.append("hook")
        return torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(
            lambda done: done.value()[0]
        )  # fmt: skip

    def wrapper(inner: Any) -> Any:
        def wrapped(state, bucket):  # type: ignore[no-untyped-def]
            calls.append("wrapper")
            return inner(state, bucket)

        return wrapped

    strategy = DDPStrategy(ddp_comm_hook=hook, ddp_comm_state=calls, ddp_comm_wrapper=wrapper)
    return {"run": whole_run(strategy, steps=2), "calls": calls}


def sync_batchnorm() -> dict[str, Any]:
    connected("ddp")
    return {
        "ddp": whole_run("ddp", batch_norm=True),
        "fsdp": whole_run(FSDPStrategy(auto_wrap_policy={Block}), batch_norm=True),
    }


# ---- the module shards itself


class Parallel(Net):
    """Tensor parallelism in the blocks, and sharding over the data-parallel ranks."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        torch.manual_seed(7)
        super().configure_model()
        if self.mesh is None:
            return
        mesh = self.mesh["tensor_parallel"]
        plan = {"linear": ColwiseParallel(output_layouts=Replicate())}
        for block in (self.body[1], self.body[2]):
            parallelize_module(block, mesh, plan)
        parallelize_module(self.body[0], mesh, RowwiseParallel(input_layouts=Replicate()))
        for block in (self.body[1], self.body[2]):
            fully_shard(block, mesh=self.mesh["data_parallel"])
        fully_shard(self, mesh=self.mesh["data_parallel"])

    def __init__(self, mesh: Any = None) -> None:
        super().__init__()
        self.mesh = mesh


def parallel_run(data: int, tensor: int) -> dict[str, Any]:
    strategy = connected(ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor))
    module = Parallel(strategy.device_mesh)  # type: ignore[attr-defined]
    optimizer = prepared(strategy, module)
    losses = train(strategy, module, optimizer, range(4), clip=(0.1, "norm"))
    weight = module.body[1].linear.weight
    found = result(strategy, module, optimizer, losses=losses, shard=tuple(weight.to_local().shape))
    half = {"model": found["model"], "optimizer": found["optimizer"]}
    half = strategy.broadcast(half)
    strategy.load_model_state(module, half["model"])
    strategy.load_optimizer_state(module, optimizer, half["optimizer"])
    found["again"] = result(strategy, module, optimizer)
    return found


def model_parallel() -> dict[str, Any]:
    connected("ddp")
    sizes = [(1, 2), (2, 1)] if torch.distributed.get_world_size() == 2 else [(2, 2)]
    found: dict[str, Any] = {f"{d}x{t}": parallel_run(d, t) for d, t in sizes}
    found["errors"] = []
    for make in (lambda: ModelParallelStrategy(3, 1), lambda: ModelParallelStrategy(1, 2)):
        try:
            strategy = connected(make()) if torch.distributed.get_world_size() == 2 else make()
            module = Net()
            module.configure_model()
            strategy.setup(module, training=True)
        except MisconfigurationException as error:
            found["errors"].append(str(error))
    return found


# ---- the Trainer


class Learner(L.LightningModule):
    """Two layers under Adam; logs, validates, tests, predicts."""

    def __init__(self, *, batch_norm: bool = False, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        norm = nn.BatchNorm1d(6) if batch_norm else nn.LayerNorm(6)
        self.net = nn.Sequential(nn.Linear(4, 6, bias=not batch_norm), norm, nn.ReLU(), nn.Linear(6, 1))
        self.scale = nn.Parameter(torch.ones(1))
        self.automatic_optimization = not manual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs).to(targets.dtype), targets)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        if self.automatic_optimization:
            return loss
        for sign in (1.0, 0.5):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(sign * self.loss(batch))
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> list[float]:
        return [float(value) for value in self(batch[0])]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.02, eps=1e-4)  # 1e-8 is 0 in float16


class EarlyOptimizer(Learner):
    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.parameters(), 0.1)

    def configure_optimizers(self) -> Any:
        return self.made


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "num_sanity_val_steps": 1,
        } | options
    )  # fmt: skip


def fit(
    strategy: Any, folder: Path, *, batch_size: int, epochs: int = 2, precision: Any = None, go_on: bool = False,
    batch_norm: bool = False, manual: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A fit with all that a strategy sees; `batch_size` is this rank's."""
    module = Learner(batch_norm=batch_norm, manual=manual)
    options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    made = trainer(
        strategy=strategy, max_epochs=epochs + (1 if go_on and precision is None else 0), precision=precision,
        sync_batchnorm=batch_norm, default_root_dir=folder, **options,
    )  # fmt: skip
    # 42 samples: the last batch of each epoch is smaller, and with two ranks they get a padded one
    data = numbers(40 if batch_norm or manual else 42)
    loaders = DataLoader(data, batch_size, shuffle=not batch_norm), DataLoader(data, batch_size)
    L.seed_everything(3)
    file = folder / "middle.ckpt"
    made.fit(module, *loaders, ckpt_path=file if go_on else None)
    made.save_checkpoint(file if not go_on else folder / "end.ckpt")
    found = {
        "model": copy.deepcopy(module.state_dict()), "kind": type(module).__name__, "norm": type(module.net[1]).__name__,
        "logged": {name: float(value) for name, value in made.callback_metrics.items()}, "folder": str(folder),
        "file": torch.load(file if not go_on else folder / "end.ckpt", weights_only=True) if made.is_global_zero else None,
    }  # fmt: skip
    if not (go_on or manual or batch_norm):
        found["test"] = float(made.test(module, loaders[1], verbose=False)[0]["test_loss"])
        predicted = made.predict(module, loaders[1]) or []
        found["predicted"] = [value for batch in predicted for value in batch]
    return found


def fits() -> dict[str, Any]:
    root = Path(sys.argv[2])
    found: dict[str, Any] = {}
    for name in ("ddp", "fsdp"):
        folder = root / name
        found[name] = fit(name, folder, batch_size=4)
        found[f"{name} gone on"] = fit(name, folder, batch_size=4, go_on=True)
        found[f"{name} manual"] = fit(name, root / "manual", batch_size=4, manual=True, epochs=1)
        found[f"{name} norm"] = fit(name, root / "norm", batch_size=4, batch_norm=True, epochs=1)
    return found


def early_optimizer() -> str:
    try:
        trainer(strategy="fsdp", max_epochs=1).fit(EarlyOptimizer(), DataLoader(numbers(8), 4))
    except MisconfigurationException as error:
        return str(error)
    return ""


class ParallelLearner(Learner):
    """Its own mesh, as Lightning's documentation of ModelParallelStrategy has it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        if self.device_mesh is not None and not hasattr(self.net, "unshard"):
            plan = {
                "0": ColwiseParallel(output_layouts=Replicate()),
                "3": RowwiseParallel(input_layouts=Replicate()),
            }
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def parallel_fit() -> dict[str, Any]:
    global Learner  # noqa: PLW0603 - `fit` makes it
    Learner = ParallelLearner  # type: ignore[misc]
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    found = fit(strategy, Path(sys.argv[2]), batch_size=8, manual=True, epochs=1)
    del found["model"]  # stays distributed, as configure_model made it
    return found
