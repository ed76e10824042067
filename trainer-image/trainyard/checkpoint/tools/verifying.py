"""Whether a commit is what its record says: from the server's own word, or by reading every byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from trainyard.checkpoint.errors import (
    CheckpointError,
    NotFound,
    ShardInvalid,
    StoreConfigError,
    StoreUnavailable,
)
from trainyard.checkpoint.format.coverage import covers
from trainyard.checkpoint.format.digest import Descriptor, digest, spans
from trainyard.checkpoint.format.geometry import Box
from trainyard.checkpoint.format.tree import Ref, refs
from trainyard.checkpoint.reader import WORKERS, CheckpointReader
from trainyard.checkpoint.retry import with_retries
from trainyard.checkpoint.sources import StoreSource
from trainyard.checkpoint.tools.checksums import expected_checksum, server_checksum
from trainyard.checkpoint.tools.inventory import missing
from trainyard.checkpoint.tools.places import PATIENCE_SECONDS, Run
from trainyard.checkpoint.tools.progress import Progress, Quiet
from trainyard_api.checkpoints import Record, Shard


@dataclass(slots=True, kw_only=True)
class Verdict:
    """On one commit."""

    seq: int
    step: int
    problems: list[str] = field(default_factory=list)
    """Empty: it is sound, as far as was looked."""
    how: str = ""
    """What was looked at."""
    size: int = 0
    """Bytes of its shards."""

    @property
    def sound(self) -> bool:
        return not self.problems


def quick(run: Run, records: Iterable[Record], *, workers: int = WORKERS) -> Iterator[Verdict]:
    """From the listing, the descriptors and the checksums that the server keeps: no tensor is read.

    Raises StoreConfigError, StoreUnavailable: these say nothing about a checkpoint.
    """
    sizes = {key: each.size for key, each in run.objects.items()}
    for record in records:
        verdict = Verdict(seq=record.seq, step=record.step, size=sum(s.size for s in record.shards))
        verdict.problems = missing(record, sizes)
        bad = {problem.partition(":")[0] for problem in verdict.problems}
        whole = [s for s in record.shards if s.key not in bad]
        with ThreadPoolExecutor(max(1, min(workers, len(whole)))) as pool:
            answers = list(pool.map(lambda shard: _ask(run, shard), whole))
        verdict.problems += [problem for problem, _ in answers if problem]
        asked = sum(server for _, server in answers)
        verdict.how = "sizes, descriptors"
        if asked:
            verdict.how += f", the server's checksums ({asked} of {len(record.shards)})"
        yield verdict


def full(
    run: Run, records: Iterable[Record], *, progress: Progress | None = None, workers: int = WORKERS
) -> Iterator[Verdict]:
    """Every part is read and hashed, and every tensor of the skeletons is looked for. Memory: `workers` parts.

    Raises StoreConfigError, StoreUnavailable.
    """
    show = progress or Quiet()
    source = StoreSource(run.store)
    for record in records:
        verdict = Verdict(
            seq=record.seq, step=record.step, size=sum(s.size for s in record.shards), how="every byte"
        )
        show.begin(f"step {record.step}", verdict.size)
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
            work = []
            for shard in record.shards:
                described = _described(source, shard, verdict.problems)
                if described is None:
                    show.advance(shard.size)
                    continue
                for number, (begin, end) in enumerate(spans(shard.size, shard.part_size)):
                    work.append((shard, (number, begin, end, described.parts[number])))
            verdict.problems += filter(
                None, pool.map(lambda item: _part(source, item[0], item[1], show), work)
            )
        if verdict.sound:
            verdict.problems += unreadable(run, record)
        show.end()
        yield verdict


def unreadable(run: Run, record: Record) -> list[str]:
    """What is wrong with the content of shards that are as they were written, a sentence each."""
    try:
        reader = CheckpointReader(record, [StoreSource(run.store)])
        headers = reader.headers()
        wanted: dict[str, Ref] = {ref.name: ref for ref in refs(reader.tree("checkpoint"))}
        for rank in range(record.world_size):
            wanted |= {ref.name: ref for ref in refs(reader.tree("rank", rank))}
    except (StoreConfigError, StoreUnavailable):
        raise
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for ref in wanted.values():
        pieces = [header.entries[ref.name] for header in headers if ref.name in header.entries]
        if any(p.whole != ref.shape or p.torch_dtype != ref.dtype for p in pieces):
            problems.append(f"{ref.name}: its pieces are not of a {ref.dtype} of shape {list(ref.shape)}")
        elif not covers(Box.whole(ref.shape), [p.box for p in pieces]):
            problems.append(f"{ref.name}: its {len(pieces)} pieces are not the whole of it")
    return problems


def _ask(run: Run, shard: Shard) -> tuple[str, bool]:
    """(what is wrong, or "", whether the server has told its checksum)."""
    try:
        described = with_retries(lambda: StoreSource(run.store).descriptor(shard), seconds=PATIENCE_SECONDS)
        found = with_retries(
            lambda: server_checksum(run.uri, shard.key, endpoint=run.endpoint, region=run.region),
            seconds=PATIENCE_SECONDS,
        )
    except (NotFound, ShardInvalid) as error:
        return str(error), False
    if found is None:
        return "", False
    if found != expected_checksum(described):
        return f"{shard.key}: the server's checksum {found} is not that of its commit", True
    return "", True


def _described(source: StoreSource, shard: Shard, problems: list[str]) -> Descriptor | None:
    try:
        return with_retries(lambda: source.descriptor(shard), seconds=PATIENCE_SECONDS)
    except NotFound:
        problems.append(f"{shard.key}: its descriptor is missing")
    except ShardInvalid as error:
        problems.append(str(error))
    return None


def _part(source: StoreSource, shard: Shard, part: tuple[int, int, int, str], progress: Progress) -> str:
    """What is wrong with it, or ""."""
    number, begin, end, wanted = part
    buffer = bytearray(end - begin)
    try:
        with_retries(lambda: source.read_into(shard, begin, memoryview(buffer)), seconds=PATIENCE_SECONDS)
    except NotFound:
        return f"{shard.key}: is missing"
    except ShardInvalid as error:
        return str(error)
    except StoreUnavailable as error:
        # Cut short again and again: the object is shorter than its commit says, which a directory tells so.
        return f"{shard.key}: part {number} (bytes {begin} to {end}) cannot be read: {error}"
    finally:
        progress.advance(end - begin)
    if digest(buffer) != wanted:
        return f"{shard.key}: part {number} (bytes {begin} to {end}) does not have the SHA-256 of its commit"
    return ""
