"""What the training library costs over a loop written by hand, side by side with Lightning, Fabric and Accelerate.

All loops train the same tiny model, where the library is most of the time, on the CPU with one thread. Those of one
process take turns in pieces of some hundred steps; a figure is the difference of one round's piece from the same round's
raw loop, so that what else the machine does falls on both. The packages are those of locks/peers.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from devcluster.errors import DevclusterError
from devcluster.progress import say, step
from tests.bench.main import CHECKOUT, spread

_BOUND = 1500.0
_IMPORTS = ("torch", "trainyard", "lightning.pytorch", "accelerate")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it, in one run."""
    from devcluster.venvs import environment

    python = environment("peers") / "bin" / "python"
    rounds = args.trials
    with step(f"steps: {rounds} rounds of 11 loops in turns"):
        steps = _cases(python, "steps", {"rounds": rounds, "steps": 1000})
    with step("two ranks under torchrun"):
        ranks = _cases(python, "ranks", {"rounds": max(5, rounds // 3), "steps": 200}, ranks=2)
    with step("between two epochs"):
        epochs = _cases(python, "epochs", {"rounds": max(5, rounds // 3)})
    with step("memory and imports, a process each"):
        memory = {
            case: [_cases(python, "memory", {"case": case})[case][0] for _ in range(3)]
            for case in ("raw loop", "trainyard", "lightning")
        }
        imports = _imports(python, rounds=5)
    return {
        "versions": _versions(python),
        "microseconds_a_step": {name: spread(values) for name, values in steps.items()},
        "microseconds_a_step_over_the_raw_loop": over(steps, "raw loop"),
        "microseconds_a_log": {
            library: spread([
                (five - one) / 4
                for one, five in zip(steps[f"{library}, 1 log"], steps[f"{library}, 5 logs"], strict=True)
            ])
            for library in ("trainyard", "lightning")
        },
        "two_ranks_microseconds_a_step": {name: spread(values) for name, values in ranks.items()},
        "two_ranks_microseconds_over_raw_ddp": over(ranks, "raw DDP"),
        "microseconds_between_epochs": {name: spread(values) for name, values in epochs.items()},
        "mib_resident": {name: spread(values) for name, values in memory.items()},
        "import_seconds": {name: spread(values) for name, values in imports.items()},
        "shape": "Linear(32, 2), batches of 4, SGD, CPU, one thread; the library's own bar, logger and files off",
    }  # fmt: skip


def over(found: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Differences within the rounds."""
    return {
        name: spread([mine - raw for mine, raw in zip(values, found[base], strict=True)])
        for name, values in found.items()
        if name != base
    }


def table(result: dict[str, Any]) -> str:
    """For people: medians, with least and most."""
    titles = {
        "microseconds_a_step": "us a step",
        "microseconds_a_step_over_the_raw_loop": "us a step over the raw loop",
        "microseconds_a_log": "us for each self.log",
        "two_ranks_microseconds_a_step": "us a step, two ranks",
        "two_ranks_microseconds_over_raw_ddp": "us a step over raw DDP, two ranks",
        "microseconds_between_epochs": "us between two epochs",
        "mib_resident": "MiB resident",
        "import_seconds": "seconds to import",
    }
    lines = []
    for key, title in titles.items():
        lines.append(f"{title:<44} median     min     max")
        for name, s in result[key].items():
            lines.append(f"  {name:<42} {_n(s['p50'])} {_n(s['min'])} {_n(s['max'])}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """The picture of docs/performance.md."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), gridspec_kw={"width_ratios": [3, 1]})
    over_raw = result["microseconds_a_step_over_the_raw_loop"]
    names = list(over_raw)[::-1]
    colours = ["#1f6f8b" if name.startswith("trainyard") else "#b8b8b8" for name in names]
    _bars(
        left,
        names,
        [over_raw[n] for n in names],
        colours,
        "microseconds a step over the raw loop (log scale)",
    )
    logs = result["microseconds_a_log"]
    names = list(logs)[::-1]
    colours = ["#1f6f8b" if name.startswith("trainyard") else "#b8b8b8" for name in names]
    _bars(right, names, [logs[n] for n in names], colours, "microseconds for each self.log")
    figure.suptitle(f"{result['shape']}\n{result['cpu']}, commit {result['commit'][:7]}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(axes: Any, names: list[str], spreads: list[dict[str, Any]], colours: list[str], title: str) -> None:
    middles = [max(s["p50"], 1.0) for s in spreads]
    quarters = [statistics.quantiles(s["all"], n=4) for s in spreads]
    errors = [
        [max(0.0, m - max(q[0], 1.0)) for m, q in zip(middles, quarters, strict=True)],
        [max(0.0, q[2] - m) for m, q in zip(middles, quarters, strict=True)],
    ]
    axes.barh(names, middles, color=colours, xerr=errors, error_kw={"lw": 1})
    axes.set_xscale("log")
    axes.set_xlabel(title, fontsize=9)
    axes.tick_params(labelsize=8)
    for row, value in enumerate(middles):
        axes.annotate(f"{value:.0f}", (value, row), textcoords="offset points", xytext=(4, 5), fontsize=8)


def _n(value: float) -> str:
    return f"{value:>7.2f}" if abs(value) < 10 else f"{value:>7.0f}"


def _environment() -> dict[str, str]:
    paths = [CHECKOUT, CHECKOUT / "trainer-image", CHECKOUT / "operator"]
    return {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _cases(python: Path, what: str, settings: dict[str, Any], *, ranks: int = 1) -> dict[str, list[float]]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    module = ["-m", "tests.bench.trainer_cases", what, json.dumps(settings)]
    done = subprocess.run(
        [str(python), *launcher, *module], cwd=CHECKOUT, env=_environment(), capture_output=True, text=True,
        check=False, timeout=_BOUND,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise DevclusterError(f"tests.bench.trainer_cases {what} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def _imports(python: Path, *, rounds: int) -> dict[str, list[float]]:
    """Of everything that a script uses: a lazy module that is not used costs nothing and proves nothing."""
    use = {"trainyard": "trainyard.Trainer; trainyard.LightningModule; trainyard.Callback"}
    found: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for _ in range(rounds):
        for name in _IMPORTS:
            code = f"import time; t = time.perf_counter(); import {name}; {use.get(name, '')}\nprint(time.perf_counter() - t)"
            done = subprocess.run(
                [str(python), "-c", code],
                env=_environment(),
                capture_output=True,
                text=True,
                check=True,
                timeout=120,
            )
            found[name].append(float(done.stdout.splitlines()[-1]))
    return found


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version\n"
        "print(json.dumps({n: version(n) for n in ('torch', 'lightning', 'accelerate')}))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def report(result: dict[str, Any], out: Path) -> None:
    """Beside the JSON file: the picture."""
    path = out / f"{result['date'][:10]}-{result['commit'][:7]}-trainer.png"
    plot(result, path)
    say(f"drawn to {path}")
