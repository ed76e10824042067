"""Runs the scripts of this folder against one library, and says as JSON what came of each.

    run.py lightning|trainyard FOLDER [SITE_PACKAGES]

They are changed in their import lines only. SITE_PACKAGES: where to find tensorboard, if not here.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import os
import re
import sys
import warnings
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

SCRIPTS = ("classifier", "adversaries", "regression")
_HERE = Path(__file__).parent
_IMPORT = re.compile(r"^(from|import) (?:lightning|pytorch_lightning)\b", re.MULTILINE)


def ported(source: str) -> str:
    """The script with another import."""
    return _IMPORT.sub(r"\1 trainyard", source)


def run(name: str, library: str, folder: Path) -> dict[str, Any]:
    """In `folder`, which becomes the working directory."""
    source = (_HERE / f"{name}.py").read_text(encoding="utf-8")
    if library == "trainyard":
        source = ported(source)
    folder.mkdir(parents=True)
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, f"{name}.py", "exec"), names)  # noqa: S102 - a script of ours, as `python` would run it
    return outcome(names, folder)


def outcome(names: dict[str, Any], folder: Path) -> dict[str, Any]:
    best, trainer = names["best"], names["trainer"]
    return {
        **names["fitted"],
        "callback_metrics": sorted(trainer.callback_metrics),
        "best": Path(best.best_model_path).name,
        "kept": sorted(Path(p).name for p in best.best_k_models),
        "last": Path(best.last_model_path).name,
        "score": None if best.best_model_score is None else float(best.best_model_score),
        "files": sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "tfevents" not in p.name
        ),
        "columns": {str(p.relative_to(folder)): columns(p) for p in sorted(folder.rglob("metrics.csv"))},
        "curves": {str(p.relative_to(folder)): curves(p) for p in sorted(folder.rglob("version_*"))},
        "tested": names.get("tested"),
        "validated": names.get("validated"),
        "predicted": names["predicted"].tolist() if "predicted" in names else None,
        "weights": {k: digest(v) for k, v in names["final"].items()},
    }


def columns(table: Path) -> dict[str, list[int]]:
    """By column: the steps that have a value. How many rows they are spread over is the writer's business."""
    found: dict[str, set[int]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    found.setdefault(name, set()).add(int(row["step"]))
    return {name: sorted(steps) for name, steps in found.items()}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Of TensorBoard's files: by tag, (step, value)."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def digest(tensor: Any) -> str:
    """Bit for bit."""
    return hashlib.sha256(
        f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()
    ).hexdigest()


def signatures(package: str) -> dict[str, dict[str, str]]:
    """By public name: its parameters, with the `repr` of their defaults. "**" is there for one that takes any."""
    found: dict[str, dict[str, str]] = {}
    top = import_module(package)
    for part, names in {
        "": ["Trainer.__init__", *(f"Trainer.{fn}" for fn in ("fit", "validate", "test", "predict", "save_checkpoint")),
             *(f"LightningModule.{fn}" for fn in ("log", "log_dict", "save_hyperparameters", "all_gather", "optimizers",
                                                  "optimizer_step", "configure_gradient_clipping"))],
        "callbacks": None, "loggers": None, "profilers": None,
    }.items():  # fmt: skip
        module = import_module(f"{package}.{part}") if part else top
        for name in names or module.__all__:
            parameters = inspect.signature(attrgetter(name)(module)).parameters.values()
            found[f"{part}.{name}".strip(".")] = {
                "**" if p.kind is p.VAR_KEYWORD else p.name: repr(p.default) for p in parameters
            }
    return found


def main(library: str, folder: str, *site_packages: str) -> None:
    sys.path += site_packages
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {name: run(name, library, Path(folder) / library / name) for name in SCRIPTS}
    found["signatures"] = signatures(f"{library}.pytorch")
    Path(folder, f"{library}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
