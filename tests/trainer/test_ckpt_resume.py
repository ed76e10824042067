"""fit, validate, test and predict with ckpt_path, and trainer.save_checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trainyard as L
from tests.trainer.forkhost import Host
from tests.trainer.models import Regression, loader, trainer
from trainyard.callbacks import ModelCheckpoint
from trainyard.checkpoint.errors import CheckpointMismatch
from trainyard.errors import MisconfigurationException
from trainyard.trainer.ckpt_errors import CheckpointFileNotFound, WeightsOnlyCheckpoint


class Counter(L.Callback):
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def count(self, name: str) -> None:
        self.seen[name] = self.seen.get(name, 0) + 1

    def on_train_batch_end(self, *args: Any) -> None:
        self.count("batch")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count("validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.count("epoch")
        self.seen["mean"] = trainer.callback_metrics["loss_epoch"].item()

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


class Noisy(Regression):
    """Draws random numbers everywhere, and has a scheduler that wants a metric."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch) * (1 + 0.1 * torch.rand(()))
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        config = {"scheduler": schedule, "monitor": "val", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


def run(folder: Path, resume: Path | None = None, every: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    model, counter = Noisy(), Counter()
    saving = [ModelCheckpoint(folder, "{step}", save_top_k=-1, **every)] if every else []
    fit = trainer(
        **({"max_epochs": 4, "callbacks": [counter, *saving], "enable_checkpointing": bool(every)} | kwargs)
    )
    fit.fit(model, loader(20, 4, shuffle=True), loader(8, 4), ckpt_path=resume)
    weights = [w.tolist() for w in model.state_dict().values()]
    return (
        weights,
        counter.seen,
        fit.optimizers[0].param_groups[0]["lr"],
        torch.rand(1).item(),
        fit.global_step,
    )


@pytest.mark.parametrize(
    ("every", "kwargs"),
    [
        ({"every_n_train_steps": 1}, {}),
        ({"every_n_train_steps": 1}, {"val_check_interval": 2}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {"check_val_every_n_epoch": 2}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {"val_check_interval": 2}),
    ],
)  # fmt: skip
def test_every_file_leads_to_the_same_end(
    tmp_path: Path, every: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    """Saved at batch ends, epoch ends and validation ends: weights, callbacks, rates and generators."""
    L.seed_everything(7, verbose=False)
    whole = run(tmp_path, every=every, **kwargs)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 2
    for file in files:
        L.seed_everything(99, verbose=False)  # whatever was drawn before must not matter
        if "every_n_train_steps" in every or "val_check_interval" not in kwargs:
            assert run(tmp_path / "again", file, every=None, **kwargs) == whole, file.name
        else:
            assert run(tmp_path / "again", file, every=None, **kwargs)[0] == whole[0], file.name


def test_a_stop_in_the_middle_of_an_epoch_goes_on_there(tmp_path: Path) -> None:
    L.seed_everything(7, verbose=False)
    whole = run(tmp_path)
    L.seed_everything(7, verbose=False)
    run(tmp_path, every={"every_n_train_steps": 8}, max_steps=8)
    assert run(tmp_path, tmp_path / "step=8.ckpt")[0] == whole[0]


def test_more_epochs_than_before(tmp_path: Path) -> None:
    fit = trainer(max_epochs=2, enable_checkpointing=False)
    fit.fit(Regression(), loader(20, 4, shuffle=True))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    model, whole = Regression(), Regression()
    trainer(max_epochs=3, enable_checkpointing=False).fit(
        model, loader(20, 4, shuffle=True), ckpt_path=tmp_path / "two.ckpt"
    )
    trainer(max_epochs=3, enable_checkpointing=False).fit(whole, loader(20, 4, shuffle=True))
    assert torch.equal(model.net.weight, whole.net.weight)


# ---- what ckpt_path may be


def saved(tmp_path: Path, **kwargs: Any) -> tuple[L.Trainer, ModelCheckpoint]:
    keeper = ModelCheckpoint(tmp_path, "{epoch}", monitor="val", **kwargs)
    fit = trainer(max_epochs=3, callbacks=[keeper], enable_checkpointing=True)
    fit.fit(Noisy(), loader(20, 4), loader(8, 4))
    return fit, keeper


class Seeing(Noisy):
    seen: list[float] | None = None

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net.weight.detach().clone()


def held(path: str | Path) -> torch.Tensor:
    weight: torch.Tensor = torch.load(path, weights_only=True)["state_dict"]["net.weight"]
    return weight


def test_best_and_last(tmp_path: Path) -> None:
    fit, keeper = saved(tmp_path, save_last=True)
    for name, path in (("best", keeper.best_model_path), ("last", keeper.last_model_path)):
        model = Seeing()
        answers: Any = fit.predict(model, loader(4, 4), ckpt_path=name)
        (found, *_) = answers
        assert torch.equal(found, held(path))
        assert fit.ckpt_path == path
        fit.test(model, loader(4, 4), ckpt_path=name, verbose=False)
        fit.validate(model, loader(4, 4), ckpt_path=name, verbose=False)
    assert trainer(max_epochs=0).ckpt_path is None


def test_without_a_model_the_best_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit, keeper = saved(tmp_path)
    model = fit.lightning_module
    assert isinstance(model, Noisy)
    with torch.no_grad():
        model.net.weight.zero_()
    fit.validate(dataloaders=loader(4, 4), verbose=False)
    assert torch.equal(model.net.weight, held(keeper.best_model_path))
    assert "has no model and no ckpt_path: it takes the best checkpoint" in caplog.text
    with torch.no_grad():
        model.net.weight.zero_()
    fit.validate(model, loader(4, 4), verbose=False)
    assert not model.net.weight.any(), "a model that is given is taken as it is"


def test_last_before_the_first_fit_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So that a script may always say ckpt_path="last"."""
    for steps in (5, 5):
        keeper = ModelCheckpoint(tmp_path, save_last=True)
        fit = trainer(max_epochs=1, callbacks=[keeper], enable_checkpointing=True)
        fit.fit(Noisy(), loader(20, 4), ckpt_path="last")
        assert fit.global_step == steps
    assert caplog.text.count("there is no last checkpoint yet") == 1
    assert fit.ckpt_path == str(tmp_path / "last.ckpt")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    fit = trainer(enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="there is no ModelCheckpoint"):
        fit.fit(Noisy(), loader(), ckpt_path="best")
    with pytest.raises(MisconfigurationException, match="'hpc' is not supported"):
        fit.fit(Noisy(), loader(), ckpt_path="hpc")
    with pytest.raises((CheckpointFileNotFound, SystemExit)):
        fit.fit(Noisy(), loader(), ckpt_path=tmp_path / "none.ckpt")


def cause(call: Any) -> BaseException:
    """What a fit failed with. A failure that concerns checkpoints may end the process with its code."""
    with pytest.raises((Exception, SystemExit)) as info:
        call()
    error: BaseException = info.value
    if isinstance(error, SystemExit):
        assert error.code == 78
        assert error.__cause__ is not None
        return error.__cause__
    return error


def test_weights_only_files(tmp_path: Path) -> None:
    fit = trainer(max_epochs=1, enable_checkpointing=False)
    fit.fit(Noisy(), loader(20, 4))
    fit.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & set(checkpoint)
    error = cause(
        lambda: trainer(enable_checkpointing=False).fit(Noisy(), loader(), ckpt_path=tmp_path / "w.ckpt")
    )
    assert isinstance(error, WeightsOnlyCheckpoint)
    assert "has weights only, so no fit can go on from it" in str(error)
    fit.validate(Noisy(), loader(4, 4), ckpt_path=tmp_path / "w.ckpt", verbose=False)


def test_another_model_is_refused_unless_it_says_otherwise(tmp_path: Path) -> None:
    class More(Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.Parameter(torch.zeros(1))

    class Loose(More):
        strict_loading = False

    fit = trainer(max_epochs=1, enable_checkpointing=False)
    fit.fit(Noisy(), loader(20, 4))
    fit.save_checkpoint(tmp_path / "m.ckpt")
    error = cause(lambda: fit.validate(More(), loader(4, 4), ckpt_path=tmp_path / "m.ckpt", verbose=False))
    assert isinstance(error, CheckpointMismatch)
    assert "'more' is in the model and not in the checkpoint" in str(error)
    fit.validate(Loose(), loader(4, 4), ckpt_path=tmp_path / "m.ckpt", verbose=False)


def test_nothing_to_save_before_there_is_a_module(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no module yet"):
        trainer().save_checkpoint(tmp_path / "m.ckpt")


def test_a_file_that_only_trust_can_load_is_said_so_when_it_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(Noisy):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["extra"] = {"path": [tmp_path]}

    fit = trainer(max_epochs=1, enable_checkpointing=False)
    fit.fit(Odd(), loader(20, 4))
    fit.save_checkpoint(tmp_path / "m.ckpt")
    assert "can only be loaded with weights_only=False: checkpoint.extra.path[0] is a pathlib" in caplog.text
    fit.validate(Odd(), loader(4, 4), ckpt_path=tmp_path / "m.ckpt", weights_only=False, verbose=False)


def test_callbacks_that_are_missing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, every={"every_n_epochs": 4})
    (file,) = tmp_path.glob("*.ckpt")
    trainer(enable_checkpointing=False).fit(Noisy(), loader(20, 4), ckpt_path=file)
    assert (
        "has the state of callbacks that this Trainer does not have: Counter, ModelCheckpoint{" in caplog.text
    )


# ---- several ranks

RANKS = """
import json, sys
import torch
import trainyard as L
from tests.trainer.models import loader, trainer
from tests.trainer.test_ckpt_resume import Noisy
from trainyard.callbacks import ModelCheckpoint
path, resume, steps = sys.argv[1:]
L.seed_everything(7)
keeper = ModelCheckpoint(path, "{step}", every_n_train_steps=4, save_top_k=-1)
fit = trainer(max_epochs=int(steps), callbacks=[keeper], enable_checkpointing=True)
torch.rand(fit.global_rank + int(bool(resume)))  # the ranks' generators differ, and those of the two runs
model = Noisy()
try:
    fit.fit(model, loader(24, 4, shuffle=True), ckpt_path=resume or None)
    fit.save_checkpoint(path + "/end.ckpt")
finally:
    print("RESULT", json.dumps([model.net.weight.tolist(), torch.rand(1).item(), fit.global_step]))
"""


def ranks(host: Host, tmp_path: Path, *args: Any, world: int = 2, codes: tuple[int, ...] = (0,)) -> list[Any]:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = host.run([str(script), *map(str, args)], world=world)
    for rank in done:
        assert rank.code in codes, rank.output
    lines = [[x for x in rank.output.splitlines() if x.startswith("RESULT ")][-1] for rank in done]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def test_each_rank_goes_on_with_its_own_generators(host: Host, tmp_path: Path) -> None:
    """Steps: 3 an epoch; saved at 4, in the middle of the second of three."""
    whole = ranks(host, tmp_path, tmp_path / "a", "", 3)
    assert whole[0][1] != whole[1][1]
    assert ranks(host, tmp_path, tmp_path / "b", tmp_path / "a" / "step=4.ckpt", 3) == whole
    checkpoint = torch.load(tmp_path / "a" / "end.ckpt", weights_only=True)
    assert (checkpoint["global_step"], len(checkpoint["trainyard"]["ranks"])) == (9, 2)
    alone = ranks(host, tmp_path, tmp_path / "c", tmp_path / "a" / "step=4.ckpt", 3, world=1)
    assert alone[0][2] == 9, "a step keeps its 8 samples, also where one rank goes through them"


def test_a_missing_file_fails_all_ranks(host: Host, tmp_path: Path) -> None:
    found = ranks(host, tmp_path, tmp_path, tmp_path / "none.ckpt", 1, codes=(1, 78))
    assert [result[2] for result in found] == [0, 0]


def test_gradients_of_an_open_accumulation_are_not_in_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.loop_state.batches}.ckpt")

    fit = trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[SaveAt()], enable_checkpointing=False)
    fit.fit(Noisy(), loader(16, 4))
    assert caplog.text.count("in the middle of an accumulation has no gradients") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "3.ckpt", "4.ckpt"]


def test_the_scaler_is_under_lightnings_key(tmp_path: Path) -> None:
    fit = trainer(max_epochs=1, precision="16-mixed", enable_checkpointing=False)
    fit.fit(Noisy(), loader(16, 4))
    fit.save_checkpoint(tmp_path / "m.ckpt")
    held = torch.load(tmp_path / "m.ckpt", weights_only=True)["MixedPrecision"]
    assert {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"} == set(held)
    held["scale"] = 128.0
    checkpoint = torch.load(tmp_path / "m.ckpt", weights_only=True) | {"MixedPrecision": held}
    torch.save(checkpoint, tmp_path / "m.ckpt")
    again = trainer(max_epochs=2, precision="16-mixed", enable_checkpointing=False)
    again.fit(Noisy(), loader(16, 4), ckpt_path=tmp_path / "m.ckpt")
    assert again.precision_plugin.state_dict()["scale"] == 128.0
