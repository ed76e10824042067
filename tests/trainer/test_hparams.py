"""save_hyperparameters, load_from_checkpoint, and the data module's own things."""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

import trainyard as L
from tests.trainer.models import Regression, loader, numbers, trainer
from trainyard.checkpoint.errors import CheckpointMismatch
from trainyard.core.saving import (
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    save_hparams_to_tags_csv,
    save_hparams_to_yaml,
)
from trainyard.errors import MisconfigurationException
from trainyard.loggers.session import initial_hparams
from trainyard.trainer.ckpt_errors import UnsafeCheckpoint
from trainyard.utilities.parsing import AttributeDict


class Parent(L.LightningModule):
    def __init__(self, width: int = 4, *, depth: int = 2, **rest: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(width, depth)


class Child(Parent):
    def __init__(self, lr: float, width: int = 8, **more: Any) -> None:
        super().__init__(width, **more)


class Choosing(L.LightningModule):
    def __init__(self, *positional: Any, a: int = 1, b: str = "b", c: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters("a", "c")


class Ignoring(Parent):
    def __init__(self, width: int, loss: torch.nn.Module, lr: float = 0.1) -> None:
        super().__init__(width)
        self.save_hyperparameters(ignore=["loss", "depth"], logger=False)
        self.loss = loss


def test_arguments_of_all_classes_are_collected() -> None:
    assert Parent(3).hparams == {"width": 3, "depth": 2}
    assert Child(0.1).hparams == {"width": 8, "depth": 2, "lr": 0.1}
    assert Child(0.1, 5, depth=1, extra="e").hparams == {"width": 5, "depth": 1, "lr": 0.1, "extra": "e"}
    assert Choosing(1, 2, b="x").hparams == {"a": 1, "c": 0.5}
    assert Ignoring(4, torch.nn.MSELoss()).hparams == {"width": 4, "lr": 0.1}
    assert Regression().hparams == {}


def test_hparams_are_attributes_and_their_beginning_is_kept() -> None:
    model = Parent(3, tags=["a"])
    assert isinstance(model.hparams, AttributeDict)
    model.hparams.width = 9
    model.hparams.tags.append("b")
    assert (model.hparams["width"], model.hparams_initial.width, model.hparams_initial.tags) == (9, 3, ["a"])
    model.hparams_initial["width"] = 0
    assert model.hparams_initial.width == 3
    with pytest.raises(AttributeError, match="no 'heigth'; there is: width, depth, tags"):
        _ = model.hparams.heigth
    assert pickle.loads(pickle.dumps(model.hparams)) == copy.deepcopy(model.hparams) == model.hparams  # noqa: S301 - ours
    assert repr(AttributeDict(a=1, long="x")) == '"a":    1\n"long": x'


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    layers: list[int] = dataclasses.field(default_factory=lambda: [1])


class OneObject(L.LightningModule):
    def __init__(self, config: Any, other: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters(config)


@pytest.mark.parametrize("given", [{"lr": 0.2}, Namespace(lr=0.2), AttributeDict(lr=0.2), Config(lr=0.2)])
def test_one_object(given: Any) -> None:
    model = OneObject(given)
    assert model.hparams.lr == 0.2
    assert "other" not in model.hparams


def test_what_cannot_be_hyperparameters_is_refused() -> None:
    for given in (7, [1], torch.zeros(1)):
        with pytest.raises(ValueError, match="takes names of arguments, a dict"):
            OneObject(given)
    assert OneObject({}).hparams == {}

    class Wrong(L.LightningModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters("rate")

    with pytest.raises(ValueError, match="rate: no such argument of Wrong, which has lr"):
        Wrong(1.0)


def test_a_module_among_them_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Parent(3, loss=torch.nn.MSELoss())
    assert "hyperparameter 'loss' of Parent is a module" in caplog.text


def test_what_the_loggers_get() -> None:
    class Data(L.LightningDataModule):
        def __init__(self, width: int, batch: int = 4) -> None:
            super().__init__()
            self.save_hyperparameters()

    assert initial_hparams(Parent(3), Data(3)) == {"width": 3, "depth": 2, "batch": 4}
    assert initial_hparams(Ignoring(4, torch.nn.MSELoss()), None) is None
    assert initial_hparams(Regression(), None) is None
    with pytest.raises(MisconfigurationException, match="different values for width"):
        initial_hparams(Parent(3), Data(5))


# ---- load_from_checkpoint


class Saved(Regression):
    def __init__(self, lr: float = 0.1, name: str = "n", **rest: Any) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


def save(model: L.LightningModule, path: Path, **kwargs: Any) -> L.Trainer:
    fit = trainer(max_epochs=1, enable_checkpointing=False)
    fit.fit(model, **({"train_dataloaders": loader()} | kwargs))
    fit.save_checkpoint(path)
    return fit


def test_a_module_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    model = Saved(0.2, "x", extra=(1, 2))
    save(model, path)
    again = Saved.load_from_checkpoint(path)
    assert again.hparams == {"lr": 0.2, "name": "x", "extra": (1, 2)}
    assert torch.equal(again.net.weight, model.net.weight)
    assert Saved.load_from_checkpoint(path, name="y").hparams.name == "y"
    with path.open("rb") as file:
        assert Saved.load_from_checkpoint(file, map_location="cpu").lr == 0.2
    with pytest.raises(TypeError, match=r"call it on the class, as Saved\.load_from_checkpoint"):
        model.load_from_checkpoint(path)


def test_arguments_that_init_does_not_take_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(Saved(0.2, extra=1), tmp_path / "m.ckpt")
    assert Regression.load_from_checkpoint(tmp_path / "m.ckpt").lr == 0.2
    Regression.load_from_checkpoint(tmp_path / "m.ckpt", rate=1)
    assert "Regression takes no rate" in caplog.text


def test_a_missing_argument_is_named(tmp_path: Path) -> None:
    class Unsaved(Regression):
        def __init__(self, rate: float) -> None:
            super().__init__(rate)

    save(Unsaved(0.1), tmp_path / "m.ckpt")
    with pytest.raises(
        TypeError, match=r"Unsaved needs rate, not in the checkpoint: give it, as Unsaved\.load_from"
    ):
        Unsaved.load_from_checkpoint(tmp_path / "m.ckpt")
    assert Unsaved.load_from_checkpoint(tmp_path / "m.ckpt", rate=0.3).lr == 0.3


def test_strictness(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bigger(Saved):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.more = torch.nn.Linear(1, 1)

    class Other(Saved):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.net = torch.nn.Linear(5, 1)

    path = tmp_path / "m.ckpt"
    model = Saved()
    save(model, path)
    with pytest.raises(CheckpointMismatch, match=r"'more\.weight' is in the model and not in the checkpoint"):
        Bigger.load_from_checkpoint(path)
    assert torch.equal(Bigger.load_from_checkpoint(path, strict=False).net.weight, model.net.weight)
    assert "'more.weight' is in the model" in caplog.text
    with pytest.raises(
        CheckpointMismatch, match=r"shape \(1, 4\) in the checkpoint and \(1, 5\) in the model"
    ):
        Other.load_from_checkpoint(path, strict=False)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


LOSS = torch.nn.MSELoss()


class Rich(Regression):
    def __init__(
        self, config: Config, colour: Colour = Colour.RED, untyped: Any = Colour.RED, folder: Any = None,
        scale: Any = None, loss: Any = LOSS, act: Any = torch.nn.ReLU, weights: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()


def test_checkpoints_hold_tensors_and_primitives_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What `__init__`'s annotations describe comes back; what is lost is asked for, never taken from its text."""
    path = tmp_path / "m.ckpt"
    save(
        Rich(Config(0.5, [2, 3]), Colour.BLUE, folder=tmp_path, scale=np.float32(2), weights=np.ones(2)), path
    )
    held = torch.load(path, weights_only=True)["hyper_parameters"]
    assert held["config"] == {"lr": 0.5, "layers": [2, 3]}
    assert (held["colour"], held["folder"], held["scale"]) == (2, str(tmp_path), 2.0)
    assert held["act"] == "torch.nn.modules.activation.ReLU"
    assert len([r for r in caplog.records if "keep only a text of" in r.message]) == 1
    assert (
        "Rich, which are no numbers, strings or tensors: loss, act; load_from_checkpoint will" in caplog.text
    )
    again = Rich.load_from_checkpoint(path).hparams
    assert again.config == Config(0.5, [2, 3])
    assert (again.colour, again.untyped, again.act, again.scale) == (
        Colour.BLUE,
        Colour.RED,
        torch.nn.ReLU,
        2.0,
    )
    assert isinstance(again.loss, torch.nn.MSELoss)
    assert np.array_equal(again.weights, np.ones(2))


def test_what_is_lost_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    save(Rich(Config(), act=torch.nn.Tanh), path)
    with pytest.raises(
        TypeError, match=r"Rich\.act cannot be made anew .*only 'torch\.nn\.modules\.activation\.Tanh'"
    ):
        Rich.load_from_checkpoint(path)
    assert Rich.load_from_checkpoint(path, act=torch.nn.Tanh).hparams.act is torch.nn.Tanh
    save(Rich(Config(), untyped=Colour.BLUE), path)
    with pytest.raises(TypeError, match=r"Rich\.untyped cannot be made anew .*only 2 of it"):
        Rich.load_from_checkpoint(path)


def test_one_object_comes_back_under_its_name(tmp_path: Path) -> None:
    class Typed(Regression):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.save_hyperparameters(config)
            self.config = config

    class Loose(Regression):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config)
            self.config = config

    path = tmp_path / "m.ckpt"
    save(Typed(Config(0.7)), path)
    assert Typed.load_from_checkpoint(path).config == Config(0.7)
    assert Typed.load_from_checkpoint(path, lr=0.9).config == Config(0.9)
    save(Loose(Namespace(lr=0.7)), path)
    assert Loose.load_from_checkpoint(path).config.lr == 0.7


def test_hparams_file(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    save(Saved(0.2), path)
    save_hparams_to_yaml(tmp_path / "h.yaml", {"lr": 1e-05, "name": "no", "deep": {"a": [1, None, True]}})
    assert load_hparams_from_yaml(tmp_path / "h.yaml") == {
        "lr": 1e-05,
        "name": "no",
        "deep": {"a": [1, None, True]},
    }
    assert Saved.load_from_checkpoint(path, hparams_file=tmp_path / "h.yaml").lr == 1e-05
    save_hparams_to_tags_csv(tmp_path / "h.csv", {"lr": 0.3, "name": "x"})
    assert load_hparams_from_tags_csv(tmp_path / "h.csv") == {"lr": 0.3, "name": "x"}
    assert Saved.load_from_checkpoint(path, hparams_file=str(tmp_path / "h.csv")).lr == 0.3
    with pytest.raises(ValueError, match=r"neither \.yaml nor \.csv"):
        Saved.load_from_checkpoint(path, hparams_file="h.txt")


def test_a_module_in_the_hyperparameters_of_a_foreign_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save(
        {"state_dict": Saved().state_dict(), "hyper_parameters": {"lr": 0.4, "loss": torch.nn.MSELoss()}},
        path,
    )
    with pytest.raises(UnsafeCheckpoint, match=r"torch\.nn\.modules\.loss\.MSELoss.*say weights_only=False"):
        Saved.load_from_checkpoint(path)
    assert isinstance(Saved.load_from_checkpoint(path, weights_only=False).hparams.loss, torch.nn.MSELoss)


def test_a_class_path_in_a_checkpoint_imports_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    hparams = {"lr": 0.4, "_class_path": "antigravity.Fly", "_instantiator": "os.system"}
    torch.save({"state_dict": Saved().state_dict(), "hyper_parameters": hparams}, path)
    assert Saved.load_from_checkpoint(path).hparams == {"lr": 0.4, "name": "n"}
    hparams["_class_path"] = f"{__name__}.Saved"
    torch.save({"state_dict": Saved().state_dict(), "hyper_parameters": hparams}, path)
    assert type(Regression.load_from_checkpoint(path)) is Saved


# ---- data modules


class Data(L.LightningDataModule):
    def __init__(self, count: int = 12, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.epochs = 0

    def setup(self, stage: str) -> None:
        self.data = numbers(self.hparams.count)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.data, self.hparams.batch_size)

    def val_dataloader(self) -> Any:
        return [loader(4), loader(3)]

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": 5}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


def test_a_data_module_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    save(Saved(0.2), path, train_dataloaders=Data(8))
    again = Data.load_from_checkpoint(path)
    assert (again.hparams, again.epochs) == ({"count": 8, "batch_size": 4}, 5)
    assert Data.load_from_checkpoint(path, count=16).hparams.count == 16
    assert Saved.load_from_checkpoint(path).hparams.lr == 0.2


def test_a_data_module_says_what_it_has() -> None:
    data = Data(12)
    assert str(data) == "Data(train=?, val=4+3)"
    data.setup("fit")
    assert str(data) == "Data(train=12, val=4+3)"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(numbers(8))


def test_from_datasets() -> None:
    made = L.LightningDataModule.from_datasets(numbers(8), [numbers(2), numbers(3)], batch_size=4)
    train = made.train_dataloader()
    assert (train.batch_size, type(train.sampler).__name__) == (4, "RandomSampler")
    assert [len(part.dataset) for part in made.val_dataloader()] == [2, 3]
    with pytest.raises(NotImplementedError):
        made.test_dataloader()
    assert type(L.LightningDataModule.from_datasets(Stream()).train_dataloader().dataset) is Stream
    named = L.LightningDataModule.from_datasets({"a": numbers(2), "b": numbers(3)}).train_dataloader()
    assert sorted(named) == ["a", "b"]
    fit = trainer(max_epochs=1, enable_checkpointing=False)
    fit.fit(Regression(), datamodule=made)
    assert fit.global_step == 2
    made.trainer = None
    assert str(pickle.loads(pickle.dumps(made))) == str(made) == "LightningDataModule(train=8, val=2+3)"  # noqa: S301


def test_from_datasets_gives_init_what_it_takes() -> None:
    made = Data.from_datasets(numbers(8), batch_size=2, count=3)
    assert isinstance(made, Data)
    assert (made.hparams.count, made.hparams.batch_size, made.train_dataloader().batch_size) == (3, 2, 2)


def test_a_data_module_serves_without_a_trainer() -> None:
    class Serving(Data):
        def predict_dataloader(self) -> Any:
            return loader(4, 2)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2

    data = Serving()
    data.setup("predict")
    (first, _second) = data.predict_dataloader()
    moved = data.transfer_batch_to_device(data.on_before_batch_transfer(first, 0), torch.device("cpu"), 0)
    assert torch.equal(data.on_after_batch_transfer(moved, 0), first[0] * 2)


def test_hyperparameters_go_to_the_logger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from trainyard.loggers import CSVLogger

    caplog.set_level(logging.WARNING)
    fit = trainer(max_epochs=1, logger=CSVLogger(tmp_path), enable_checkpointing=False)
    fit.fit(Saved(0.2), loader())
    written = load_hparams_from_yaml(Path(str(fit.log_dir)) / "hparams.yaml")
    assert written == {"lr": 0.2, "name": "n"}
    assert not re.search("left out", caplog.text)
