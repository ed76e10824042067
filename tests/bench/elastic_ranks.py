"""The processes of `tests.bench.elastic`: `python -m tests.bench.elastic_ranks WORLD WAY STEPS`, in a network namespace of
its own if bytes are to be counted. Prints one JSON line: seconds of each step, bytes on the network, memory.

Ways to compute a step of V virtual ranks: "ddp" is DistributedDataParallel with as many batches on each rank, which gives
other bits at each world size. The others give the same: "tree" is the library's (`trainyard.optimization.exchange`);
"gather" has all processes send all gradients to all, and each add them up; "chain" hands a prefix sum from process to
process, and sends the last one's sum to all.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

VIRTUAL = 12
BATCH = 8
WARM_UP = 3
SIZE, LAYERS = 1024, 8


def up() -> bool:
    """Bring the loopback device of this namespace up; whether this is a namespace of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, 0x8913, request))[1]  # SIOCGIFFLAGS
        if flags & 1:
            return False
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", flags | 1))  # SIOCSIFFLAGS, IFF_UP
    return True


def sent() -> int:
    """Bytes on the loopback device, each counted once."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/net/dev: there is no lo")


def gang(world: int, way: str, steps: int) -> None:
    own = up()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        env = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "TRAINYARD_BENCH_RANK": 1,
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.bench.elastic_ranks", str(world), way, str(steps)],
                env={**os.environ, **{k: str(v) for k, v in env.items()}},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{way} at {world}: exit codes {[rank.returncode for rank in ranks]}")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    result = found[0]
    result["memory_mib"] = max(one["memory_mib"] for one in found)
    result["weights"] = sorted({one["weights"] for one in found})
    if not own:
        result["bytes"] = None
    print(json.dumps(result), flush=True)


# ---- one rank


def rank(world: int, way: str, steps: int) -> None:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    import trainyard as L
    from tests.trainer.elastic_run import digest

    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(LAYERS)), nn.Dropout(0.1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.carried: list[int] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if way not in ("ddp", "tree"):
                replace(trainer.fit_loop.optimization, way, trainer.strategy)  # type: ignore[union-attr]

        def on_before_zero_grad(
            self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
        ) -> None:
            self.times.append(time.perf_counter())
            self.carried.append(sent())

    L.seed_everything(0, verbose=False)
    elastic = {"deterministic": "elastic", "virtual_ranks": VIRTUAL} if way != "ddp" else {}
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu", strategy="ddp", max_steps=WARM_UP + steps + 1, max_epochs=-1, logger=False,
        callbacks=[clock], enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=VIRTUAL // world if way == "ddp" else 1, **elastic,
    )  # fmt: skip
    data = TensorDataset(torch.randn(VIRTUAL * BATCH * 4, SIZE))
    model = Net()
    trainer.fit(model, DataLoader(data, BATCH))
    times, carried = clock.times[WARM_UP:], clock.carried[WARM_UP:]
    print(
        json.dumps(
            {
                "seconds": [b - a for a, b in itertools.pairwise(times)],
                "bytes": (carried[-1] - carried[0]) / (len(carried) - 1),
                "gradient_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "weights": digest(model.state_dict()),
            }
        )
    )


class Leaves:
    """In the place of `Fold`: every leaf stays on its own, and they are added up one after the other."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def put(self, node: Any, value: Any) -> None:
        self.found.append((node, value))

    def take(self) -> list[Any]:
        found, self.found = self.found, []
        return found


class Gather:
    """All gradients to all processes, bucket by bucket."""

    def total(self, nodes: list[Any]) -> Any:
        import torch
        import torch.distributed as dist

        world = dist.get_world_size()
        for flats, put in bucketed(nodes):
            mine = torch.stack(flats)
            every = mine.new_empty((world * len(flats), mine.shape[1]))
            dist.all_gather_into_tensor(every, mine)
            total = every[0]
            for one in every[1:]:
                total += one
            put(total)
        return nodes[0][1]


class Chain:
    """A prefix sum from process to process, bucket by bucket, so that they work at the same time; then to all."""

    def total(self, nodes: list[Any]) -> Any:
        import torch
        import torch.distributed as dist

        rank, world = dist.get_rank(), dist.get_world_size()
        held, pending = [], []
        for flats, put in bucketed(nodes):
            if rank:
                total = torch.empty_like(flats[0])
                dist.recv(total, rank - 1)
                total += flats[0]
            else:
                total = flats[0]
            for one in flats[1:]:
                total += one
            if rank + 1 < world:
                pending.append(dist.isend(total, rank + 1))
            held.append((total, put))
        for work in pending:
            work.wait()
        for total, put in held:
            dist.broadcast(total, world - 1)
            put(total)
        return nodes[0][1]


def bucketed(nodes: list[Any]) -> Any:
    import torch

    from trainyard.optimization.exchange import BUCKET_BYTES, buckets

    first = nodes[0][1].tensors
    for chosen in buckets(first, BUCKET_BYTES):
        flats = [torch.cat([g.tensors[i].reshape(-1) for i in chosen]) for _, g in nodes]

        def put(total: torch.Tensor, chosen: list[int] = chosen) -> None:
            parts = total.split([first[i].numel() for i in chosen])
            for index, part in zip(chosen, parts, strict=True):
                first[index].copy_(part.view(first[index].shape))

        yield flats, put


def replace(optimization: Any, way: str, strategy: Any) -> None:
    optimization._fold = Leaves()
    optimization._exchange = Gather() if way == "gather" else Chain()


if __name__ == "__main__":
    work = rank if "TRAINYARD_BENCH_RANK" in os.environ else gang
    work(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
