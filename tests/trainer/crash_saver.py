"""A life of a run that is killed all the time: `crash_saver.py URI ENDPOINT RUN ACKNOWLEDGED STEPS`.

The state of a step is a function of the step alone, so that whoever resumes can tell whether it has every bit. Each step whose
commit is acknowledged goes into the file ACKNOWLEDGED. Exit codes: 3 not the state of its step, 4 an acknowledged step is
gone, 79 fenced.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.engine import Checkpointer
from trainyard.checkpoint.loading import whole
from trainyard.checkpoint.payload import Payload
from trainyard.peers import Alone
from trainyard_api.checkpoints import Cursor, Fenced

ELEMENTS = 5 << 20
"""20 MiB: two parts."""


def state(step: int) -> dict[str, Any]:
    bits = torch.arange(ELEMENTS, dtype=torch.int32).mul_(2654435761 % 2**31 * 2 + 1).add_(step)
    return {"step": step, "weights": bits, "lr": 0.1**step, "names": {"layer": ("a", step)}}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    weights = torch.equal(found.pop("weights"), wanted.pop("weights"))
    return weights and found == wanted


def main(uri: str, endpoint: str, run: str, acknowledged: str, steps: str) -> int:
    config = CheckpointConfig(uri=uri, endpoint=endpoint or None, run=run, every_n_steps=1, keep=2)
    checkpointer = Checkpointer(config, Alone(), {"torch": "x"})
    step = 0
    try:
        if checkpointer.open() is not None:
            loaded = checkpointer.load(whole)
            assert loaded is not None
            step = loaded.record.step
            print(f"resumed at {step}; passed over: {loaded.fell_back or 'nothing'}", flush=True)
            if not same(dict(loaded.state.main), state(step)):
                return 3
        known = Path(acknowledged).read_text().split() if Path(acknowledged).exists() else []
        if step < max(map(int, known), default=0):
            print(f"step {known[-1]} was acknowledged", flush=True)
            return 4
        for number in range(step + 1, step + 1 + int(steps)):
            payload = Payload(checkpoint=state(number), own={})
            checkpointer.finish(number, Cursor(samples=number), lambda payload=payload: payload)  # type: ignore[misc]
            with Path(acknowledged).open("a") as file:
                file.write(f"{number}\n")
                file.flush()
                os.fsync(file.fileno())
    except Fenced as error:
        print(error, flush=True)
        return 79
    checkpointer.close(failed=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
