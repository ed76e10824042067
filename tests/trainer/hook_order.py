"""The order in which hooks are called, by running a fit, a validation, a test and a prediction.

`hook_order.txt` was written by running Lightning 2.6.6 (in an environment that has it):

    python tests/trainer/hook_order.py lightning.pytorch > tests/trainer/hook_order.txt

One line per hook: who had it called, then its name. S EarlyStopping, A and B custom callbacks, C ModelCheckpoint,
M the module. The callbacks were given to the Trainer in the order C S A B.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

EXPECTED = Path(__file__).with_suffix(".txt")
SCENARIOS = (
    "fit", "fit_within", "fit_without_validation", "fit_every_step", "exception", "resume", "validate", "test", "predict",
)  # fmt: skip
_STAGES = [
    f"on_{stage}_{what}" for stage in ("validation", "test", "predict")
    for what in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
]  # fmt: skip
_MODULE_HOOKS = [
    "setup", "teardown", "prepare_data", "configure_model", "configure_optimizers", "configure_callbacks",
    "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end",
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_validation_model_eval", "on_test_model_eval", "on_predict_model_eval",
    "on_validation_model_zero_grad", "on_save_checkpoint", "on_load_checkpoint", "on_before_batch_transfer",
    "transfer_batch_to_device", "on_after_batch_transfer", "training_step", "validation_step", "test_step",
    "predict_step", "backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping",
    "lr_scheduler_step", *_STAGES,
]  # fmt: skip


def _stage(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    stage = kwargs["stage"] if "stage" in kwargs else args[-1]
    return str(getattr(stage, "value", stage))


def recording(base: type, label: str, hooks: Iterable[str], log: list[tuple[str, str]]) -> Any:
    """`base` with hooks that write into `log` before they do what they did."""

    def hook(name: str) -> Callable[..., Any]:
        inner = getattr(base, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.append(
                (label, name if name not in ("setup", "teardown") else f"{name}({_stage(args, kwargs)})")
            )
            return inner(self, *args, **kwargs)

        method.__name__ = name
        method.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
        return method

    return type(f"Recording{base.__name__}", (base,), {name: hook(name) for name in hooks})


def record(library: str, scenario: str) -> list[str]:
    """What `scenario` calls in `library`, as in the file."""
    lib, callbacks = importlib.import_module(library), importlib.import_module(f"{library}.callbacks")
    log: list[tuple[str, str]] = []
    data = DataLoader(TensorDataset(torch.ones(8, 4)), 2)
    monitor = "train" if scenario in ("fit_without_validation", "fit_every_step") else "val"

    class Net(lib.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if scenario == "exception" and batch_idx == 1:
                raise RuntimeError("on purpose")
            loss = self.net(batch[0]).mean()
            self.log("train", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if dataloader_idx == 0:
                self.log("val", self.net(batch[0]).mean(), add_dataloader_idx=False)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        def train_dataloader(self) -> Any:
            return data

        def val_dataloader(self) -> Any:
            return [data, data] if scenario == "fit_within" else data

        def test_dataloader(self) -> Any:
            return data

        def predict_dataloader(self) -> Any:
            return data

    names = [n for n in dir(callbacks.Callback) if n.startswith("on_") and n != "on_logs_flushed"]
    names += ["setup", "teardown"]

    def make(base: type, label: str, *args: Any, **kwargs: Any) -> Any:
        return recording(base, label, names, log)(*args, **kwargs)

    every = {"every_n_train_steps": 1} if scenario == "fit_every_step" else {}
    arguments: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 2 if scenario == "fit" else 1, "limit_train_batches": 2,
        "limit_val_batches": 0 if scenario == "fit_without_validation" else 1, "limit_test_batches": 2,
        "limit_predict_batches": 2, "num_sanity_val_steps": 0 if scenario in ("fit_within", "resume") else 1,
    }  # fmt: skip
    if scenario == "fit_within":
        arguments |= {
            "limit_train_batches": 4,
            "accumulate_grad_batches": 2,
            "val_check_interval": 0.5,
        }

    def trainer(folder: str, **more: Any) -> Any:
        given = [
            make(callbacks.ModelCheckpoint, "C", dirpath=folder, monitor=monitor, **every),
            make(callbacks.EarlyStopping, "S", monitor, patience=100),
            make(callbacks.Callback, "A"),
            recording(callbacks.Callback, "B", names, log)(),
        ]
        return lib.Trainer(callbacks=given, default_root_dir=folder, **arguments | more)

    module = recording(Net, "M", _MODULE_HOOKS, log)
    with tempfile.TemporaryDirectory() as folder:
        if scenario == "resume":
            first = trainer(folder)
            first.fit(module())
            path = first.checkpoint_callback.best_model_path
            log.clear()
            trainer(f"{folder}/second", max_epochs=2).fit(module(), ckpt_path=path)
        elif scenario == "exception":
            try:
                trainer(folder).fit(module())
            except RuntimeError:
                log.append(("", "raised"))
        elif scenario.startswith("fit"):
            trainer(folder).fit(module())
        elif scenario == "predict":
            trainer(folder).predict(module())
        else:
            getattr(trainer(folder), scenario)(module(), verbose=False)
    grouped = itertools.groupby(log, key=lambda entry: entry[1])
    return [f"{''.join(label for label, _ in entries):5} {hook}" for hook, entries in grouped]


def expected(scenario: str) -> list[str]:
    """What Lightning does."""
    _, _, text = EXPECTED.read_text().partition(f"# {scenario}\n")
    return text.partition("\n#")[0].splitlines()


if __name__ == "__main__":
    for scenario in SCENARIOS:
        print(f"# {scenario}")
        print("\n".join(record(sys.argv[1], scenario)))
