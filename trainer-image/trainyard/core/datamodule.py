"""LightningDataModule: data and its transforms, apart from the model, for training and for serving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trainyard.core.hooks import DataHooks
from trainyard.core.hparams import HyperparametersMixin
from trainyard.core.saving import LoadDataModule

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from trainyard.trainer.trainer import Trainer

    Datasets = Dataset[Any] | Sequence[Dataset[Any]] | Mapping[str, Dataset[Any]]

_STAGES = ("train", "val", "test", "predict")


class LightningDataModule(HyperparametersMixin, LoadDataModule, DataHooks):
    """`lightning.pytorch.LightningDataModule`.

    It needs no trainer: `prepare_data()`, `setup("predict")`, and then its loaders and its three transfer hooks may be
    called by anybody, so that a server prepares its input with the code that prepared the training's.
    """

    CHECKPOINT_HYPER_PARAMS_KEY: ClassVar[str] = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: ClassVar[str] = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: ClassVar[str] = "datamodule_hparams_type"
    name: str | None = None
    prepare_data_per_node: bool = True
    allow_zero_length_dataloader_with_multiple_devices: bool = False
    trainer: Trainer | None = None

    @classmethod
    def from_datasets(  # noqa: PLR0917 - Lightning's signature
        cls, train_dataset: Datasets | Iterable[Any] | None = None, val_dataset: Datasets | None = None,
        test_dataset: Datasets | None = None, predict_dataset: Datasets | None = None, batch_size: int = 1,
        num_workers: int = 0, **datamodule_kwargs: Any,
    ) -> Self:  # fmt: skip
        """With DataLoaders for those that are given: each one dataset, or a list or dict of them. Training data is
        shuffled, unless it is an IterableDataset. The other arguments go to `__init__`, `batch_size` and `num_workers`
        too if it takes them."""
        from trainyard.utilities.hints import parameters_of

        given = dict(zip(_STAGES, (train_dataset, val_dataset, test_dataset, predict_dataset), strict=True))
        taken = {p.name for p in parameters_of(cls)}
        loading = {"batch_size": batch_size, "num_workers": num_workers}
        arguments = {**{k: v for k, v in loading.items() if k in taken}, **datamodule_kwargs}
        datasets = {k: v for k, v in given.items() if v is not None}
        return _with_datasets(cls, datasets, loading, arguments)  # type: ignore[no-any-return]

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """What to keep in checkpoints, under the class's name: tensors and primitives."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def on_exception(self, exception: BaseException) -> None:
        """When an entry point of the trainer ends with an exception."""

    def __str__(self) -> str:
        """Its loaders with their numbers of samples; "?" before `setup`, and for data without a length."""
        found = {
            stage: self._samples(stage)
            for stage in _STAGES
            if getattr(type(self), f"{stage}_dataloader") is not getattr(DataHooks, f"{stage}_dataloader")
        }
        inner = ", ".join(f"{stage}={samples}" for stage, samples in found.items())
        return f"{type(self).__name__}({inner})"

    def _samples(self, stage: str) -> str:
        try:
            loaders = getattr(self, f"{stage}_dataloader")()
            if isinstance(loaders, Mapping):
                loaders = list(loaders.values())
            parts: Any = loaders if isinstance(loaders, list | tuple) else [loaders]
            return "+".join(str(len(getattr(part, "dataset", part))) for part in parts)
        except Exception:  # a user's code before its setup: anything
            return "?"


def _with_datasets(
    cls: type[Any], datasets: dict[str, Any], loading: dict[str, int], arguments: dict[str, Any]
) -> Any:
    """An instance of a subclass of `cls` that has the hooks for which there is data, and no others."""

    def hook(stage: str) -> Any:
        return lambda self: _loaders(datasets[stage], shuffle=stage == "train", **loading)

    def reduce(self: Any) -> Any:
        return _with_datasets, (cls, datasets, loading, arguments), self.__dict__

    body: dict[str, Any] = {f"{stage}_dataloader": hook(stage) for stage in datasets}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**body, **names, "__reduce__": reduce})(**arguments)


def _loaders(data: Any, *, shuffle: bool, batch_size: int, num_workers: int) -> Any:
    from torch.utils.data import DataLoader, IterableDataset

    if isinstance(data, Mapping):
        options: dict[str, Any] = {"shuffle": shuffle, "batch_size": batch_size, "num_workers": num_workers}
        return {name: _loaders(part, **options) for name, part in data.items()}
    if isinstance(data, list | tuple):
        return [
            _loaders(part, shuffle=shuffle, batch_size=batch_size, num_workers=num_workers) for part in data
        ]
    shuffle = shuffle and not isinstance(data, IterableDataset)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)
