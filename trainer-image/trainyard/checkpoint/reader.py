"""Reading the shards of one commit: only what is asked for, from whichever source has it, and nothing unverified.

A part is fetched whole, because only a whole part can be checked; several are on their way at a time, each into a buffer
of its own or straight to where it belongs. So memory beyond what is loaded is `workers` parts.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointError, NotFound, ShardInvalid, StoreUnavailable
from trainyard.checkpoint.format.coverage import disjoint
from trainyard.checkpoint.format.digest import Descriptor, digest
from trainyard.checkpoint.format.geometry import Box, Index
from trainyard.checkpoint.format.runs import Run, runs_of
from trainyard.checkpoint.format.shardfile import Header, header_length, read_header
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.sharing import Item, hand_round
from trainyard.checkpoint.sources import Source
from trainyard.peers import Peers
from trainyard_api.checkpoints import Record, Shard

if TYPE_CHECKING:
    import torch

log = logging.getLogger("trainyard.checkpoint")

PATIENCE_SECONDS = 10.0
"""How long a source may be unreachable before the next one is asked."""
WORKERS = 8
Parts = dict[tuple[str, int], tuple[Shard, list[Run]]]
"""By key and number of the part: what it is for."""
_KEPT_HEADS = 64 << 20
"""Bytes of verified beginnings of shards that are kept between the reading of headers and of tensors."""


@dataclass(frozen=True, slots=True)
class Request:
    """Fill `target`, contiguous and on the CPU, with the piece `box` of the tensor `name`."""

    name: str
    box: Box
    whole: Index
    """The shape of the whole tensor."""
    target: torch.Tensor


class CheckpointReader:
    """Raises ShardInvalid (try an older commit), StoreUnavailable, StoreConfigError. One thread calls."""

    def __init__(self, record: Record, sources: Sequence[Source], *, workers: int = WORKERS) -> None:
        self.record = record
        self._sources = sources
        self._workers = workers
        self._lock = threading.Lock()
        self._headers: dict[int, Header] = {}
        self._heads: dict[tuple[str, int], bytes] = {}
        self._at: dict[str, int] = {}
        """By key: the source that is asked first; those before it have failed."""
        self._why: dict[str, CheckpointError] = {}
        """By key: what the last source that was asked lacked."""
        self._descriptors: dict[tuple[str, int], Descriptor] = {}
        self.bytes_read: Counter[str] = Counter()
        """By the source's name."""

    # ---- headers

    def share_headers(self, peers: Peers) -> None:
        """Collective: the beginning of each shard is read by one rank, and kept by all as far as there is room."""
        shards = self.record.shards
        beginnings: dict[str, bytes] = {shard.key: b"" for shard in shards}
        room = _KEPT_HEADS

        def item(shard: Shard, number: int) -> Item:
            nonlocal room
            size = min(shard.part_size, shard.size - number * shard.part_size)
            room -= size
            keep = room >= 0

            def take(data: memoryview) -> None:
                have = beginnings[shard.key] + bytes(data)
                beginnings[shard.key] = have[: header_length(have, shard.size)]
                if keep:
                    self._heads[shard.key, number] = bytes(data)

            def fetch(buffer: memoryview) -> None:
                self._part(shard, number, buffer)

            return Item(shard.rank % peers.world, size, fetch, take)

        hand_round([item(shard, 0) for shard in shards], peers)
        lengths = {shard.key: header_length(beginnings[shard.key], shard.size) for shard in shards}
        parts = {shard.key: -(-lengths[shard.key] // shard.part_size) for shard in shards}
        hand_round([item(shard, number) for shard in shards for number in range(1, parts[shard.key])], peers)
        for shard in shards:
            self._headers[shard.rank] = self._parse(shard, beginnings[shard.key])

    def header(self, rank: int) -> Header:
        """Of the shard that rank `rank` wrote."""
        if rank not in self._headers:
            self._headers[rank] = self._read_header(self._shard(rank))
        return self._headers[rank]

    def headers(self) -> list[Header]:
        """Of all shards, by rank."""
        missing = [rank for rank in range(self.record.world_size) if rank not in self._headers]
        for rank, header in zip(
            missing, self._parallel(self._read_header, map(self._shard, missing)), strict=True
        ):
            self._headers[rank] = header
        return [self._headers[rank] for rank in range(self.record.world_size)]

    def tree(self, name: str, rank: int = 0) -> Any:
        """The skeleton `name` ("checkpoint" or "rank") in the shard of `rank`."""
        trees = self.header(rank).trees
        if name not in trees:
            raise ShardInvalid(f"{self._shard(rank).key}: has no {name!r}")
        return trees[name]

    # ---- tensors

    def load(self, requests: Iterable[Request], *, first: int | None = None) -> None:
        """`plan` and `fetch`."""
        self.fetch(self.plan(requests, first=first))

    def plan(self, requests: Iterable[Request], *, first: int | None = None) -> list[tuple[Shard, Run]]:
        """Where all targets' contents are. `first`: the rank whose shard probably has them; the others' headers are read if
        it has not. Raises ShardInvalid if the checkpoint has not."""
        pending = list(requests)
        wanted: list[tuple[Shard, Run]] = []
        if first is not None and first < self.record.world_size:
            pending = self._plan(pending, [first], wanted, final=False)
        if pending:
            self.headers()
            self._plan(pending, range(self.record.world_size), wanted, final=True)
        return wanted

    def fetch(self, wanted: list[tuple[Shard, Run]], peers: Peers | None = None) -> None:
        """Fill the targets of a plan. With `peers` it is collective: what all ranks want, one of them reads."""
        parts = _by_part(wanted)
        if peers is not None:
            parts = self._fetch_together(parts, peers)
        self._fetch(parts)
        for _, run in wanted:
            run.finish()
        self._heads.clear()

    def _plan(
        self, requests: list[Request], ranks: Iterable[int], wanted: list[tuple[Shard, Run]], *, final: bool
    ) -> list[Request]:
        """Adds to `wanted` what the shards of `ranks` have; the requests that they do not fill."""
        headers = [(self._shard(rank), self.header(rank)) for rank in ranks]
        left = []
        for request in requests:
            entries = [(s, h.entries[request.name]) for s, h in headers if request.name in h.entries]
            if any(e.whole != request.whole for _, e in entries):
                raise ShardInvalid(
                    f"{request.name}: its pieces are not of a tensor of shape {list(request.whole)}"
                )
            runs = [(s, run) for s, e in entries for run in runs_of(e, request.box, request.target)]
            covered = sum(run.elements for _, run in runs)
            if covered == request.box.numel and (len(runs) < 2 or disjoint([e.box for _, e in entries])):
                wanted += runs
            elif final:
                raise ShardInvalid(
                    f"{request.name}: the checkpoint of step {self.record.step} has {covered} of its "
                    f"{request.box.numel} elements, each once"
                )
            else:
                left.append(request)
        return left

    def _fetch_together(self, parts: Parts, peers: Peers) -> Parts:
        """The parts that not all ranks want."""
        numbers = {shard.key: shard.rank for shard in self.record.shards}
        everybody = peers.gather(
            [[numbers[key], part] for key, part in parts if (key, part) not in self._heads]
        )
        common = set.intersection(*({(rank, part) for rank, part in wanted} for wanted in everybody))
        # One part of each shard in turn: so all ranks read at the same time.
        order = sorted(common, key=lambda item: (item[1], item[0]))

        def item(rank: int, number: int) -> Item:
            shard = self._shard(rank)
            begin = number * shard.part_size

            def take(data: memoryview) -> None:
                for run in parts[shard.key, number][1]:
                    run.take(begin, data)

            def fetch(buffer: memoryview) -> None:
                self._part(shard, number, buffer)

            return Item(rank % peers.world, min(shard.part_size, shard.size - begin), fetch, take)

        hand_round([item(rank, number) for rank, number in order], peers)
        return {key: part for key, part in parts.items() if (numbers[key[0]], key[1]) not in common}

    def _fetch(self, parts: Parts) -> None:
        local = threading.local()

        def work(item: tuple[tuple[str, int], tuple[Shard, list[Run]]]) -> None:
            (_, number), (shard, runs) = item
            begin = number * shard.part_size
            length = min(shard.part_size, shard.size - begin)
            straight = runs[0].window(begin, begin + length) if len(runs) == 1 else None
            if straight is not None:
                self._part(shard, number, straight)
                return
            if not hasattr(local, "buffer") or len(local.buffer) < shard.part_size:
                local.buffer = bytearray(shard.part_size)
            buffer = memoryview(local.buffer)[:length]
            self._part(shard, number, buffer)
            for run in runs:
                run.take(begin, buffer)

        self._parallel(work, parts.items())

    # ---- bytes

    def _shard(self, rank: int) -> Shard:
        if rank >= len(self.record.shards):
            raise ShardInvalid(f"the commit of step {self.record.step} has no shard of rank {rank}")
        return self.record.shards[rank]

    def _read_header(self, shard: Shard) -> Header:
        beginning = self._head(shard, 0)
        length = header_length(beginning, shard.size)
        for number in range(1, -(-length // shard.part_size)):
            beginning += self._head(shard, number)
        return self._parse(shard, beginning)

    @staticmethod
    def _parse(shard: Shard, beginning: bytes) -> Header:
        try:
            return read_header(beginning, shard.size)
        except ShardInvalid as error:
            raise ShardInvalid(f"{shard.key}: {error}") from error

    def _head(self, shard: Shard, number: int) -> bytes:
        begin = number * shard.part_size
        buffer = bytearray(min(shard.part_size, shard.size - begin))
        self._part(shard, number, memoryview(buffer))
        with self._lock:
            if sum(map(len, self._heads.values())) + len(buffer) <= _KEPT_HEADS:
                self._heads[shard.key, number] = bytes(buffer)
        return bytes(buffer)

    def _part(self, shard: Shard, number: int, buffer: memoryview) -> None:
        """Fill `buffer` with a part that is what the commit says it is."""
        kept = self._heads.get((shard.key, number))
        if kept is not None:
            buffer[:] = kept
            return
        for index in range(self._at.get(shard.key, 0), len(self._sources)):
            source = self._sources[index]
            try:
                wanted = self._descriptor(source, index, shard).parts[number]
                _patiently(lambda: source.read_into(shard, number * shard.part_size, buffer))  # noqa: B023
                if digest(buffer) != wanted:
                    raise ShardInvalid(f"{shard.key}: part {number} does not have the SHA-256 of its commit")
                with self._lock:
                    self.bytes_read[source.name] += len(buffer)
                return
            except NotFound as error:
                why: CheckpointError = ShardInvalid(f"{shard.key}: is missing ({error})")
            except (ShardInvalid, StoreUnavailable) as error:
                why = error
            if source.name != "store":
                log.info("%s source: %s; the next one is asked", source.name, why)
            with self._lock:
                self._at[shard.key] = max(self._at.get(shard.key, 0), index + 1)
                self._why[shard.key] = why
        # The last source is the truth; what the copies lack says nothing about the checkpoint. If no source was left to ask,
        # another thread found the last one wanting.
        raise self._why[shard.key]

    def _descriptor(self, source: Source, index: int, shard: Shard) -> Descriptor:
        with self._lock:
            known = self._descriptors.get((shard.key, index))
        if known is None:
            known = _patiently(lambda: source.descriptor(shard))
            with self._lock:
                self._descriptors[shard.key, index] = known
        return known

    def _parallel(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        items = list(items)
        if len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(self._workers, len(items)), thread_name_prefix="checkpoint-read") as pool:
            try:
                return list(pool.map(work, items))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _by_part(wanted: list[tuple[Shard, Run]]) -> Parts:
    parts: Parts = {}
    for shard, run in wanted:
        for number in range(run.begin // shard.part_size, -(-run.end // shard.part_size)):
            parts.setdefault((shard.key, number), (shard, []))[1].append(run)
    return parts


def _patiently(call: Callable[[], Any]) -> Any:
    return with_retries(call, seconds=PATIENCE_SECONDS, longest=2.0)
