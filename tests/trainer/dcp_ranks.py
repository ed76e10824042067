"""What the ranks of the DCP tests do: `dcp_ranks.py VERB URI OUTPUT`, in a gang of any size.

`state` is the same whatever the number of ranks; rank 0 leaves what was loaded, whole, in OUTPUT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from trainyard.checkpoint.dcp import RunStorageReader, RunStorageWriter

RUN = "run-1"


def number(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(*shape, generator=generator)


def whole_state() -> dict[str, Any]:
    """As it is on one rank. Lengths that neither 2 nor 3 divides; a row fewer than three ranks have."""
    return {
        "model": {
            "rows": number("rows", 7, 3), "columns": number("columns", 3, 5), "few": number("few", 2, 4),
            "same": number("same", 4), "plain": number("plain", 3), "half": number("half", 5).to(torch.bfloat16),
            "scalar": torch.tensor(3), "empty": torch.zeros(0, 2),
        },
        "optim": [{"step": torch.tensor(7.0)}, {"lr": 0.5, "betas": (0.9, 0.99)}],
        "epoch": 3, "name": "x", "nothing": None, "odd": float("nan"), "raw": b"\x00\xff", "names": ["a", "b"],
    }  # fmt: skip


def state(world: int, *, blank: bool = False) -> dict[str, Any]:
    made = whole_state()
    if blank:
        made["model"] = {name: torch.full_like(t, 99) for name, t in made["model"].items()}
        made["optim"] = [{"step": torch.tensor(0.0)}, {"lr": 0.0, "betas": None}]
        made |= {"epoch": 0, "name": "", "nothing": 1, "odd": 0.0, "raw": b"", "names": []}
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        placed = {
            "rows": Shard(0),
            "columns": Shard(1),
            "few": Shard(0),
            "same": Replicate(),
            "half": Shard(0),
        }
        for name, placement in placed.items():
            made["model"][name] = distribute_tensor(made["model"][name], mesh, [placement])
    return made


def full(value: Any) -> Any:
    """Collective."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full(each) for key, each in value.items()}
    return [full(each) for each in value] if isinstance(value, list) else value


def main(verb: str, uri: str, output: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world > 1 else 0
    endpoint = os.environ.get("TRAINYARD_CHECKPOINT_ENDPOINT")
    if verb == "load":
        mine = state(world, blank=True)
        reader = RunStorageReader(uri, RUN, endpoint=endpoint)
        dcp.load(mine, storage_reader=reader)
        found = full(mine)
        if rank == 0:
            torch.save({"state": found, "step": reader.record.step}, output)
    else:
        mine = state(world) | {f"only-{rank}": rank * 10}
        writer = RunStorageWriter(uri, RUN, endpoint=endpoint)
        if verb == "async":
            kind = dcp.state_dict_saver.AsyncCheckpointerType.THREAD
            saving: Any = dcp.async_save(
                mine, checkpoint_id="8", storage_writer=writer, async_checkpointer_type=kind
            )
            for name in ("rows", "plain"):  # training goes on: what was staged must not change
                value = mine["model"][name]
                (value.to_local() if isinstance(value, DTensor) else value).zero_()
            saving.result(60)
        else:
            dcp.save(mine, checkpoint_id="5", storage_writer=writer)
            dcp.save(mine, storage_writer=writer)
        writer.close()
        if rank == 0:
            Path(output).write_text("saved")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
