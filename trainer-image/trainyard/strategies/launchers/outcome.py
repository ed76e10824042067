"""What the ranks of "spawn" and "fork" leave for the process that made them: by rank 0, in files of a private folder."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.core.module import LightningModule
    from trainyard.trainer.trainer import Trainer

_WEIGHTS = "weights.pt"
_REST = "rest.pickle"


def leave(trainer: Trainer, answer: Any, folder: Path) -> None:
    """Raises TypeError when the entry point returned what cannot be pickled."""
    import torch

    module = trainer.lightning_module
    if trainer.state.fn == "fit":
        torch.save(
            {name: value.detach().cpu() for name, value in module.state_dict().items()}, folder / _WEIGHTS
        )
    rest = {
        "state": (trainer.state.status, trainer.state.fn, trainer.state.stage),
        "loop_state": trainer.loop_state.state_dict(),
        "metrics": (
            {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            dict(trainer.metrics.logged), dict(trainer.metrics.bar),
        ),
        "callbacks": [(callback.state_key, callback.state_dict()) for callback in trainer.callbacks],
    }  # fmt: skip
    try:
        data = pickle.dumps({**rest, "answer": answer})
    except Exception as error:  # pickle raises many kinds
        raise TypeError(
            f"what {trainer.state.fn} returned cannot be brought back from its process ({error}); "
            "use return_predictions=False, or strategy='ddp'"
        ) from error
    (folder / _REST).write_bytes(data)


def take_over(trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any], folder: Path) -> Any:
    """Make the Trainer, its callbacks and the module of this process what rank 0's are; what the entry point returned."""
    import torch

    module = _module_of(trainer, args, kwargs)
    if module is not None:
        trainer._module = module
        module.trainer = trainer
        if (folder / _WEIGHTS).exists():
            module.load_state_dict(torch.load(folder / _WEIGHTS, weights_only=True, map_location="cpu"))
    rest = pickle.loads((folder / _REST).read_bytes())  # noqa: S301 - our own process wrote it, into our own folder
    trainer.state.status, trainer.state.fn, trainer.state.stage = rest["state"]
    trainer.loop_state = type(trainer.loop_state).from_state(rest["loop_state"])
    metrics = trainer.metrics
    metrics.callback, metrics.logged, metrics.bar = rest["metrics"]
    for callback, (key, state) in zip(trainer.callbacks, rest["callbacks"], strict=False):
        if state and callback.state_key == key:
            if (
                getattr(callback, "dirpath", "") is None
            ):  # of a ModelCheckpoint, which looked for one in setup
                callback.dirpath = state.get("dirpath")  # type: ignore[attr-defined]
            callback.load_state_dict(state)
    return rest["answer"]


def _module_of(trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LightningModule | None:
    from trainyard.core.compiled import unwrap

    given = args[0] if args else kwargs.get("model")
    return trainer._module if given is None else unwrap(given)
