"""`./dev bench`: figures with the hardware, the commit and the spread they were measured with."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from devcluster.progress import say

CHECKOUT = Path(__file__).resolve().parents[2]


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, write one JSON file."""
    import importlib

    bench = importlib.import_module(f"tests.bench.{args.what}")
    result = {"what": args.what, **where(), **bench.measure(args)}
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path = args.out / f"{stamp}-{_git('rev-parse', '--short', 'HEAD')}-{args.what}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(bench.table(result))
    say(f"written to {path}")
    if hasattr(bench, "report"):
        bench.report(result, args.out)
    return 0


def where() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
    }


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


def spread(values: list[float]) -> dict[str, Any]:
    """p50, p99 (the worst of fewer than 100 trials), least and most, and all of them."""
    if not values:
        return {"trials": 0}
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return {
        "trials": len(ordered),
        "p50": at(0.5),
        "p99": at(0.99),
        "min": round(ordered[0], 3),
        "max": round(ordered[-1], 3),
        "all": [round(v, 3) for v in values],
    }
