"""Which feed for which loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainyard.data.combined import CombinedFeed
from trainyard.data.feed import Feed
from trainyard.data.loader import SampledFeed
from trainyard.data.once import warn_once
from trainyard.data.order import Counted, Drawn, Order
from trainyard.data.sampler import EpochPlan
from trainyard.data.virtual import block
from trainyard.data.workers import WorkerInit, is_plain, remake
from trainyard.errors import MisconfigurationException
from trainyard.reproducibility import derived_seed
from trainyard.utilities.combined_loader import CombinedLoader, rebuild

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from trainyard.data.stream import StreamFeed


def make_feed(
    loader: Any, *, rank: int, world: int, seed: int, accumulate: int = 1, limit: int | float | None = None,
    resample: bool = True, what: str = "train", in_order: bool = False, virtual: int | None = None,
) -> Feed:  # fmt: skip
    """The feed for what a `*_dataloader` hook returned: a loader, a collection of them, or anything to iterate over.

    `limit`: batches (int) or a fraction (float). `resample`: use_distributed_sampler. `in_order`: do not shuffle
    (overfit_batches). `virtual`: number of virtual ranks, whose batches do not depend on `world`. Raises
    MisconfigurationException.
    """
    from torch.utils.data import DataLoader

    if isinstance(limit, float) and limit == 1.0:
        limit = None
    options: dict[str, Any] = {
        "rank": rank, "world": world, "resample": resample, "what": what, "in_order": in_order, "virtual": virtual,
    }  # fmt: skip
    if isinstance(loader, CombinedLoader | dict | list | tuple):
        combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        return _combined(loader, combined, seed=seed, accumulate=accumulate, limit=limit, **options)
    if isinstance(loader, DataLoader) and not _is_iterable(loader) and (resample or is_plain(loader)):
        return _sampled(loader, seed=seed, accumulate=accumulate, limit=limit, **options)
    if virtual:
        raise MisconfigurationException(_NOT_DIVISIBLE.format(what, type(loader).__name__))
    return _stream(loader, rank=rank, world=world, seed=seed, accumulate=accumulate, limit=limit, what=what)


def _combined(
    given: Any,
    combined: CombinedLoader,
    *,
    seed: int,
    accumulate: int,
    limit: int | float | None,
    **options: Any,
) -> Feed:
    loaders, world = combined.flattened, options["world"]
    alone = len(loaders) == 1
    parts: list[Feed] = [
        # Two loaders of one length must not be shuffled alike.
        make_feed(
            loader, seed=derived_seed("part", seed, n) if n else seed, accumulate=accumulate if alone else 1,
            limit=limit if alone or combined.mode == "sequential" else None, **options,
        )
        for n, loader in enumerate(loaders)
    ]  # fmt: skip
    if alone and (combined.mode == "sequential" or given is loaders[0]):
        return parts[0]
    if alone:
        return _Shaped(given, parts[0], combined)
    if options["virtual"]:
        raise MisconfigurationException(_SEVERAL.format(options["what"]))
    return CombinedFeed(
        given, parts, combined.mode, lambda data: rebuild(combined.iterables, data), world=world,
        accumulate=accumulate, limit=None if combined.mode == "sequential" else limit,
    )  # fmt: skip


class _Shaped:
    """The feed of a collection of one: the part's own, with its exact weights, in the collection's shape."""

    def __init__(self, given: Any, part: Feed, combined: CombinedLoader) -> None:
        self.given = given
        self._part, self._shape = part, combined.iterables

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    @property
    def accumulate(self) -> int:
        return self._part.accumulate

    @accumulate.setter
    def accumulate(self, batches: int) -> None:
        self._part.accumulate = batches

    @property
    def origin(self) -> int | None:
        return self._part.origin

    @origin.setter
    def origin(self, ranks: int | None) -> None:
        self._part.origin = ranks

    def iterate(self, epoch: int, used: int) -> Any:
        for plan, data in self._part.iterate(epoch, used):
            yield plan, rebuild(self._shape, [data])


# ---- map-style


def _sampled(
    loader: DataLoader[Any], *, rank: int, world: int, seed: int, accumulate: int, limit: int | float | None,
    resample: bool, what: str, in_order: bool, virtual: int | None,
) -> SampledFeed:  # fmt: skip
    from torch.utils.data import SequentialSampler

    batched = _is_batched(loader)
    followed: Any = loader.sampler if batched or loader.batch_sampler is None else loader.batch_sampler
    if in_order and _shuffles(followed):
        warn_once(f"overfit_batches: the {what} DataLoader is read in order, not shuffled")
        followed = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
    order, apart = _order(loader, followed, rank, world)
    if virtual and (apart or not resample):
        raise MisconfigurationException(_DIVIDED.format(what))
    apart = (apart or not resample) and world > 1
    if what != "train" and not in_order and _shuffles(followed):
        warn_once(
            f"the {what} DataLoader shuffles; that costs comparability from one evaluation to the next: shuffle=False"
        )
    if isinstance(limit, float) and order.samples is None:
        raise MisconfigurationException(_FRACTION.format(what, limit))
    plan = EpochPlan(
        samples=order.samples or 0, batch_size=loader.batch_size or 1 if batched else 1,
        world=virtual or (1 if apart else world), accumulate=accumulate, drop_last=batched and loader.drop_last,
        limit=limit,
    )  # fmt: skip
    own = block(rank, world, virtual) if virtual else None
    return SampledFeed(loader, plan, order, rank=rank, world=world, seed=seed, whole=not batched, virtual=own)


def _order(loader: DataLoader[Any], followed: Any, rank: int, world: int) -> tuple[Order, bool]:
    """And whether the sampler divides itself among the ranks."""
    from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

    sampler, name = followed, type(followed).__name__
    ours = type(sampler).__module__.partition(".")[0] in ("torch", "torchdata")
    if type(sampler) is SequentialSampler:
        return Counted(len(sampler), shuffle=False), False
    if ours and name == "RandomSampler" and loader.generator is None:
        # torchdata's has a generator of its own in any case.
        own = type(sampler) is RandomSampler and sampler.generator is not None
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        if whole and not own:
            return Counted(sampler.num_samples, shuffle=True), False
    if ours and isinstance(sampler, DistributedSampler):
        if (sampler.num_replicas, sampler.rank) == (world, rank):
            return Drawn(_undivided(sampler)), False
        return Drawn(sampler), True
    return Drawn(followed, loader.generator), _divides(followed)


def _undivided(sampler: Any) -> Any:
    """The order that all ranks' DistributedSamplers are parts of, without what they repeat to be of equal length."""
    from torch.utils.data import DistributedSampler

    return DistributedSampler(
        sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed, drop_last=False
    )


def _divides(sampler: Any, depth: int = 3) -> bool:
    """By the attributes that DistributedSampler has made customary."""
    ranks = hasattr(sampler, "rank") and (hasattr(sampler, "num_replicas") or hasattr(sampler, "world_size"))
    inner = getattr(sampler, "sampler", None)
    return ranks or (depth > 0 and inner is not None and _divides(inner, depth - 1))


def _is_batched(loader: DataLoader[Any]) -> bool:
    """Whether the batches are made by DataLoader's own batch sampler, from the sampler."""
    from torch.utils.data import BatchSampler

    made: Any = loader.batch_sampler
    return (
        isinstance(made, BatchSampler)
        and type(made).__name__ == "BatchSampler"
        and type(made).__module__.partition(".")[0] in ("torch", "torchdata")
        and loader.batch_size is not None
        and made.sampler is loader.sampler
    )


def _shuffles(sampler: Any) -> bool:
    from torch.utils.data import DistributedSampler, RandomSampler

    if isinstance(sampler, DistributedSampler):
        return bool(sampler.shuffle)
    return isinstance(sampler, RandomSampler) or type(sampler).__name__ == "RandomSampler"


def _is_iterable(loader: DataLoader[Any]) -> bool:
    from torch.utils.data import IterableDataset

    return isinstance(loader.dataset, IterableDataset)


# ---- what can only be iterated


def _stream(
    loader: Any, *, rank: int, world: int, seed: int, accumulate: int, limit: int | float | None, what: str
) -> StreamFeed:
    import torch
    from torch.utils.data import DataLoader, IterDataPipe

    from trainyard.data.reader import Reader, unchanged
    from trainyard.data.stream import StreamFeed

    opened = isinstance(loader, DataLoader) and is_plain(loader) and _is_iterable(loader)
    opened = opened and not isinstance(loader.dataset, IterDataPipe)
    workers = loader.num_workers if opened else 0
    length = _length(loader)
    exact = length is not None and not workers
    repeats = isinstance(loader, list | tuple | range)
    reader = Reader(
        loader.dataset if opened else loader, batch_size=loader.batch_size if opened else None,
        drop_last=opened and loader.drop_last, collate=loader.collate_fn if opened else None, seed=seed, rank=rank,
        every=0 if exact else getattr(loader, "snapshot_every_n_steps", None) or 1, draws=not repeats,
        shared=workers > 0,
    )  # fmt: skip
    around = None
    if workers or (opened and loader.pin_memory):
        around = remake(
            loader, dataset=reader, batch_size=None, batch_sampler=None, drop_last=False, collate_fn=unchanged,
            worker_init_fn=WorkerInit(loader.worker_init_fn, rank), generator=torch.Generator(),
            _IterableDataset_len_called=None,
        )  # fmt: skip
    if isinstance(limit, float):
        if length is None:
            raise MisconfigurationException(_FRACTION.format(what, limit))
        limit = int(length * limit)
    return StreamFeed(
        loader, reader, around, workers=workers, length=length, exact=exact, limit=limit, world=world,
        accumulate=accumulate, repeats=repeats,
    )  # fmt: skip


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


_FRACTION = "limit_{}_batches={}: a fraction of a loader without a length is not known; limit it by a number of batches"
_NOT_DIVISIBLE = (
    "deterministic='elastic': the {} data is a {} that only can be iterated, so nobody can say which of its samples belong "
    "to which virtual rank; give a DataLoader over a dataset with __len__ and __getitem__"
)
_SEVERAL = "deterministic='elastic': the {} data is a collection of several loaders; make one dataset and one DataLoader of them"
_DIVIDED = (
    "deterministic='elastic': the {} data divides itself among the processes (a sampler with a rank of its own, or "
    "use_distributed_sampler=False), so its batches depend on their number; leave that to the Trainer"
)
