"""BaseFinetuning and BackboneFinetuning: what is trained when, in one process and several, and after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainyard as L
from tests.trainer.callback_runs import run, same, weights
from tests.trainer.forkhost import Host
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from trainyard.errors import MisconfigurationException


class Grown(L.LightningModule):
    """A backbone with normalisation, and a head that alone is in the optimizer."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
        self.head = nn.Linear(4, 1)
        self.whole = whole

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        return nn.functional.mse_loss(self.head(self.backbone(inputs)), targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD((self if self.whole else self.head).parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Seen(Callback):
    """At each epoch's end: rates, sizes of the groups, what of the backbone is trainable."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.sizes: list[list[int]] = []
        self.trainable: list[list[bool]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append([round(group["lr"], 9) for group in groups])
        self.sizes.append([len(group["params"]) for group in groups])
        self.trainable.append([p.requires_grad for p in pl_module.backbone.parameters()])


def fitted(callback: Callback, module: Any = None, epochs: int = 5) -> tuple[Any, Seen]:
    module, seen = module or Grown(), Seen()
    trainer(callbacks=[callback, seen], max_epochs=epochs).fit(module, loader(16, 8))
    return module, seen


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        ({}, [[0.05], [0.025], [0.0125, 0.00125], [0.00625, 0.0025], [0.003125, 0.003125]]),
        (
            {"backbone_initial_lr": 0.5, "should_align": False},
            [[0.05], [0.025], [0.0125, 0.25], [0.00625, 0.5], [0.003125, 1.0]],
        ),
        (
            {"backbone_initial_ratio_lr": 0.5},
            [[0.05], [0.025], [0.0125, 0.00625], [0.00625, 0.00625], [0.003125, 0.003125]],
        ),
    ],
)
def test_rates_are_those_of_lightning(arguments: dict[str, Any], rates: list[list[float]]) -> None:
    """As Lightning 2.6.6 had them with this model."""
    _, seen = fitted(BackboneFinetuning(unfreeze_backbone_at_epoch=2, **arguments))
    assert seen.rates == rates
    assert seen.sizes == [[2], [2], [2, 6], [2, 6], [2, 6]]
    assert seen.trainable[1] == [False, False, True, True, False, False]
    assert all(seen.trainable[2])


def test_without_normalisation() -> None:
    """It stays frozen; Lightning leaves it trainable, and in no optimizer."""
    module, seen = fitted(BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False), epochs=2)
    assert seen.sizes == [[2], [2, 4]]
    assert seen.trainable == [[False] * 6, [True, True, False, False, True, True]]
    assert torch.equal(module.backbone[1].weight, torch.ones(4))
    assert int(module.backbone[1].num_batches_tracked) == 0


def test_frozen_is_frozen() -> None:
    before = weights(Grown().backbone)
    module, _ = fitted(BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False))
    assert same(weights(module.backbone), before)


def test_what_is_in_the_optimizer_already_stays_there(caplog: pytest.LogCaptureFixture) -> None:
    _, seen = fitted(BackboneFinetuning(unfreeze_backbone_at_epoch=1), Grown(whole=True), epochs=2)
    assert seen.sizes == [[8], [8]]
    assert "6 parameters are in SGD already" in caplog.text


def test_a_module_without_a_backbone() -> None:
    with pytest.raises(MisconfigurationException, match="Regression needs an attribute `backbone`"):
        trainer(callbacks=BackboneFinetuning()).fit(Regression(), loader())


def test_parts_of_modules() -> None:
    backbone = Grown().backbone
    linear, norm, inner = backbone
    assert BaseFinetuning.flatten_modules([linear, [norm, inner]]) == [linear, norm, inner[0]]
    assert BaseFinetuning.flatten_modules(nn.ModuleDict({"a": inner})) == [inner[0]]
    BaseFinetuning.freeze(backbone, train_bn=True)
    assert list(BaseFinetuning.filter_params(backbone)) == list(norm.parameters())
    assert not list(BaseFinetuning.filter_params(backbone, train_bn=False))
    frozen = list(BaseFinetuning.filter_params(backbone, requires_grad=False))
    assert frozen == [*linear.parameters(), *inner.parameters()]
    BaseFinetuning.make_trainable(linear)
    assert all(p.requires_grad for p in linear.parameters())
    BaseFinetuning.freeze_module(norm)
    assert not norm.track_running_stats


class PartByPart(BaseFinetuning):
    """One more part at each epoch. Keeps the epochs that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        self.epochs.append(epoch)
        if 1 <= epoch <= 3:
            self.unfreeze_and_add_param_group(pl_module.backbone[epoch - 1], optimizer)


def test_part_by_part() -> None:
    callback = PartByPart()
    _, seen = fitted(callback, epochs=5)
    assert seen.sizes == [[2], [2, 2], [2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]
    assert callback.epochs == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "make", [PartByPart, lambda: BackboneFinetuning(1), lambda: BackboneFinetuning(2, train_bn=False)]
)
def test_a_broken_run_ends_with_the_same_weights(tmp_path: Path, make: Any) -> None:
    def callbacks(folder: Path) -> list[Callback]:
        return [make(), Seen()]

    _, net, (_, seen) = run(tmp_path / "unbroken", callbacks, module=Grown, epochs=4)
    for stop in range(2, 16, 3):
        folder = tmp_path / str(stop)
        run(folder, callbacks, stop_at=stop, module=Grown, epochs=4, every=2)
        _, resumed, (_, again) = run(folder, callbacks, module=Grown, epochs=4, every=2)
        assert same(weights(resumed), weights(net)), stop
        assert again.rates == seen.rates[-len(again.rates) :], stop  # type: ignore[attr-defined]
        assert again.trainable == seen.trainable[-len(again.rates) :], stop  # type: ignore[attr-defined]


def test_what_lightning_had_unfrozen_is_trained(tmp_path: Path) -> None:
    """Its files have the groups only."""
    fit = trainer(callbacks=BackboneFinetuning(1), max_epochs=2)
    fit.fit(Grown(), loader(16, 8))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del saved["callbacks"]["BackboneFinetuning"]["trainyard"]
    torch.save(saved, tmp_path / "a.ckpt")
    seen = Seen()
    trainer(callbacks=[BackboneFinetuning(1), seen], max_epochs=3).fit(
        Grown(), loader(16, 8), ckpt_path=tmp_path / "a.ckpt"
    )
    assert seen.sizes == [[2, 6]]
    assert all(seen.trainable[0])


# ---- several processes

SCRIPT = """
import json, os, sys
import torch
from tests.trainer.models import loader, trainer
from tests.trainer.test_callbacks_finetuning import BackboneFinetuning, Grown

class Plain(Grown):
    def __init__(self):
        super().__init__()
        self.backbone[1] = torch.nn.Identity()  # its statistics would be those of a rank

module = Plain()
world = int(os.environ.get("WORLD_SIZE", "1"))
fit = trainer(
    callbacks=BackboneFinetuning(1, backbone_initial_ratio_lr=1.0), max_epochs=3, strategy="ddp" if world > 1 else "auto"
)
fit.fit(module, loader(32, 8 // world))
print("RESULT", json.dumps([p.flatten().tolist() for p in module.parameters()]))
"""


def test_ranks_average_the_gradients_of_what_was_unfrozen(host: Host, tmp_path: Path) -> None:
    """With Lightning, DDP leaves out what was frozen when training began, and the ranks drift apart."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    found = []
    for world in (1, 2):
        ranks = host.run([str(script)], world=world)
        assert not any(rank.code for rank in ranks), ranks[0].output[-3000:]
        lines = [next(t for t in r.output.splitlines() if t.startswith("RESULT")) for r in ranks]
        assert len(set(lines)) == 1
        found.append([torch.tensor(part) for part in eval(lines[0].removeprefix("RESULT"))])  # noqa: S307
    alone, together = found
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(alone, together, strict=True))
