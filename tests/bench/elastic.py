"""What elastic determinism costs: `./dev bench elastic`. One step of 12 virtual ranks, on 2 and on 4 processes over gloo, by
plain DDP and by three ways to add up gradients in a fixed order (`elastic_ranks`)."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from typing import Any

from devcluster.progress import say
from tests.bench.main import CHECKOUT

WORLDS = (2, 4)
WAYS = ("ddp", "tree", "gather", "chain")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all ways in turn, so that what else the machine does hits all of them alike."""
    rounds = max(1, args.trials // 5)
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for world in WORLDS:
            for way in WAYS:
                say(f"round {number + 1} of {rounds}: {way} on {world} processes")
                found.setdefault(f"{way} {world}", []).append(_run(world, way, steps=10))
    bits = {
        way: sorted({w for world in WORLDS for r in found[f"{way} {world}"] for w in r["weights"]})
        for way in WAYS
    }
    return {
        "rounds": rounds,
        "runs": {key: _summary(runs) for key, runs in found.items()},
        "weights": bits,
    }


def _run(world: int, way: str, *, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.elastic_ranks", str(world), way, str(steps)]
    if shutil.which("unshare") and os.geteuid() == 0:
        command = ["unshare", "--net", *command]
    path = os.pathsep.join(str(CHECKOUT / part) for part in ("operator", "trainer-image", "."))
    done = subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True,
        timeout=600,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [s for run in runs for s in run["seconds"]]
    carried = [run["bytes"] / run["gradient_bytes"] for run in runs if run["bytes"] is not None]
    return {
        "step_seconds": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
        "gradient_mib": runs[0]["gradient_bytes"] / 2**20,
        "network_per_gradient": statistics.median(carried) if carried else None,
        "memory_mib": statistics.median(run["memory_mib"] for run in runs),
    }


def table(result: dict[str, Any]) -> str:
    """Network: bytes of a step over all processes, by the size of the gradients. Memory: the largest process."""
    lines = [
        f"{'way':8}{'processes':>10}{'step, ms':>10}{'least':>8}{'network':>10}{'memory':>12}{'same bits':>11}"
    ]
    for key, run in result["runs"].items():
        way, world = key.split()
        network = run["network_per_gradient"]
        carried = "-" if network is None else f"{network:.1f} x"
        step, least = (f"{run['step_seconds'][which] * 1000:.0f}" for which in ("median", "least"))
        same = "yes" if len(result["weights"][way]) == 1 else "no"
        lines.append(
            f"{way:8}{world:>10}{step:>10}{least:>8}{carried:>10}{run['memory_mib']:>8.0f} MiB{same:>11}"
        )
    return "\n".join(lines)
