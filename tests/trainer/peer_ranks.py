"""Ranks in another Python environment than the tests' own, and what they have found."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from tests.trainer.pods import ROOT, free_port


def run(
    python: Path, script: str, case: str, folder: Path, *, world: int, seconds: float = 120, code: int = 0, **more: str
) -> list[Any]:  # fmt: skip
    """`script CASE FOLDER` as `world` ranks; each leaves its findings as FOLDER/CASE-RANK, if `code`, with which all
    must end, is 0."""
    folder.mkdir(exist_ok=True)
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "PL_", "TORCHELASTIC", "TRAININGRUN"))
    }
    env = {
        **kept, **more, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "trainer-image", ROOT / "operator"))),
        "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    outputs = [folder / f"{case}-{rank}.log" for rank in range(world)]
    ranks = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [python, script, case, str(folder)], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                    )
                )  # fmt: skip
        deadline = time.monotonic() + seconds
        for each in ranks:
            each.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the assertion below says it
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    codes = [each.returncode for each in ranks]
    assert codes == [code] * world, f"{codes}\n" + "\n".join(
        o.read_text(errors="replace")[-4000:] for o in outputs
    )
    return (
        [] if code else [torch.load(folder / f"{case}-{rank}", weights_only=False) for rank in range(world)]
    )
