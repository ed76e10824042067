"""What `deterministic="elastic"` cannot keep its promise with, it refuses, and says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import trainyard as L
from tests.trainer.models import Regression, loader, numbers, trainer
from trainyard.errors import MisconfigurationException
from trainyard.strategies import DDPStrategy, ModelParallelStrategy


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Of torch, as they were."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def elastic(**options: Any) -> L.Trainer:
    return trainer(**{"deterministic": "elastic", "virtual_ranks": 3, "max_epochs": 1, **options})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(numbers(12))


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Newton(Regression):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Sparse(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 2, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.table(torch.tensor([1, 2])).sum() * batch[0].mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Gathering(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.all_gather(batch[0])
        return self.loss(batch)


def compress(state: Any, bucket: Any) -> Any:
    raise AssertionError("it is never registered")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fsdp"}, "strategy 'fsdp' adds up gradients"),
        ({"strategy": ModelParallelStrategy()}, "strategy 'model_parallel' adds up gradients"),
        ({"strategy": DDPStrategy(ddp_comm_hook=compress)}, "strategy 'ddp' adds up gradients"),
        ({"sync_batchnorm": True}, "sync_batchnorm computes over the batches of all processes at once"),
        ({"virtual_ranks": None}, "virtual_ranks: None is not a positive integer"),
        ({"deterministic": True}, "virtual_ranks: it says how a step is divided"),
        ({"deterministic": "elastik"}, "is not True, False, 'warn' or 'elastic'"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        elastic(**options)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, "does not go with automatic_optimization=False"),
        (Newton, "cannot be used with LBFGS"),
        (Sparse, "does not add up sparse gradients"),
        (Gathering, "self.all_gather in training_step"),
    ],
)
def test_modules(module: type[L.LightningModule], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        elastic().fit(module(), loader())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(Stream(), 4), "the train data is a DataLoader that only can be iterated"),
        (lambda: [loader(), loader()], "the train data is a collection of several loaders"),
        (
            lambda: DataLoader(numbers(12), 4, sampler=DistributedSampler(numbers(12), 2, 0)),
            "the train data divides itself among the processes",
        ),
    ],
    ids=["iterable", "several", "divided"],
)
def test_data(data: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        elastic().fit(Regression(), data())


def test_a_step_without_a_loss_adds_nothing() -> None:
    """Of one virtual rank: nobody waits for its gradients alone, as other ranks would."""

    class Choosy(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.trainer.batch_plan.virtual == 1 else self.loss(batch)

    fit, module = elastic(), Choosy()
    before = module.net.weight.detach().clone()
    fit.fit(module, loader())
    assert fit.global_step == 1
    assert not torch.equal(before, module.net.weight)


def test_one_step_is_the_mean_over_all_samples() -> None:
    """What the virtual ranks compute is what one batch of all their samples would give, up to rounding."""
    small, large = Regression(), Regression()
    elastic(precision="64-true").fit(small, loader(12, 4))
    trainer(precision="64-true").fit(large, loader(12, 12))
    torch.testing.assert_close(small.net.weight, large.net.weight, rtol=1e-12, atol=1e-12)
