"""Where a run takes its state from: which file `ckpt_path` means, and what is in it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointError
from trainyard.core.portable import OWN
from trainyard.errors import MisconfigurationException
from trainyard.trainer import ckpt_file
from trainyard.trainer.ckpt_errors import CheckpointFileDamaged

if TYPE_CHECKING:
    from trainyard.checkpoint.resume import Loaded
    from trainyard.peers import Peers
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint that was read."""

    checkpoint: dict[str, Any]
    rank: dict[str, Any] | None
    """What only this rank knew; None if the checkpoint does not say, or is of another world size."""
    first: dict[str, Any] | None
    """What rank 0 knew, at any world size."""
    uri: str
    """For messages."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """On rank 0, if the checkpoint is of another world size: what each rank knew, but for tensors."""

    @property
    def own(self) -> dict[str, Any] | None:
        """Our part; None in a checkpoint that Lightning wrote."""
        return self.checkpoint.get(OWN)


def from_engine(loaded: Loaded, world: int) -> Source:
    """What the checkpoint engine found."""
    same, state = loaded.record.world_size == world, loaded.state
    return Source(
        checkpoint=state.main, rank=state.own if same else None, first=state.first, uri=loaded.uri,
        ranks=[] if same else state.ranks,
    )  # fmt: skip


def from_file(trainer: Trainer, path: str | os.PathLike[str], weights_only: bool | None = None) -> Source:
    """Collective: every rank reads the file, and all fail if one cannot.

    Raises what `ckpt_file.read` does.
    """
    peers, rank = trainer.strategy.peers, trainer.global_rank
    checkpoint: dict[str, Any] = {}
    error: Exception | None = None
    try:
        checkpoint = ckpt_file.read(path, map_location="cpu", weights_only=weights_only)
        if "state_dict" not in checkpoint:
            known = ", ".join(list(map(str, checkpoint))[:5])
            raise CheckpointFileDamaged(
                f"{path} is not a Lightning checkpoint: it has no 'state_dict', but {known or 'nothing'}"
            )
    except (CheckpointError, OSError, MisconfigurationException) as problem:
        error = problem
    raise_together(peers, error)
    ranks = (checkpoint.get(OWN) or {}).get("ranks", [])
    same = len(ranks) == trainer.world_size
    return Source(
        checkpoint=checkpoint,
        rank=ranks[rank] if same else None,
        first=ranks[0] if ranks else None,
        uri=str(path),
        ranks=[] if same else ranks,
    )


def raise_together(peers: Peers, error: Exception | None) -> None:
    """Collective: nothing if no rank has an error; else each raises its own, or the first of the others'."""
    said = peers.gather(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}")


def resolve(
    trainer: Trainer, ckpt_path: str | os.PathLike[str] | None, *, fn: str, model_given: bool
) -> str | None:
    """Collective: the path that `trainer.<fn>(ckpt_path=...)` means, rank 0's for all; None to load nothing.

    "best" is that of the first ModelCheckpoint, "last" the newest of all; None without a model means "best", as
    Lightning's. Raises MisconfigurationException.
    """
    path: str | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            path = _resolve(trainer, ckpt_path, fn, model_given)
        except MisconfigurationException as problem:
            error = problem
    failure = trainer.strategy.peers.broadcast(None if error is None else str(error))
    if failure is not None:
        raise MisconfigurationException(failure)
    found: str | None = trainer.strategy.peers.broadcast(path)
    return found


def _resolve(
    trainer: Trainer, given: str | os.PathLike[str] | None, fn: str, model_given: bool
) -> str | None:
    if given is None:
        if fn == "fit":
            return _last(trainer, fn) if _on_exception(trainer) else None
        if model_given:
            return None
        _log.warning(
            "trainer.%s() has no model and no ckpt_path: it takes the best checkpoint; ckpt_path='best' or 'last' "
            "says which without this warning", fn,
        )  # fmt: skip
        given = "best"
    if given == "best":
        return _best(trainer, fn)
    if given == "last":
        return _last(trainer, fn)
    if given in ("hpc", "registry") or str(given).startswith("registry:"):
        raise MisconfigurationException(
            f"ckpt_path={str(given)!r} is not supported; a TrainingRun resumes by itself, a script gives a path, 'best' or 'last'"
        )
    return os.fspath(given)


def _best(trainer: Trainer, fn: str) -> str:
    callbacks = [c for c in trainer.callbacks if hasattr(c, "best_model_path")]
    if not callbacks:
        raise MisconfigurationException(
            f"trainer.{fn}(ckpt_path='best'): there is no ModelCheckpoint callback"
        )
    if len(callbacks) > 1:
        _log.warning(
            "trainer.%s(ckpt_path='best') takes the first of %d ModelCheckpoints", fn, len(callbacks)
        )
    path = str(callbacks[0].best_model_path)
    if not path:
        why = "fast_dev_run writes no checkpoints" if trainer.fast_dev_run else "it has saved nothing yet"
        raise MisconfigurationException(
            f"trainer.{fn}(ckpt_path='best'): ModelCheckpoint has no best model: {why}"
        )
    return path


def _last(trainer: Trainer, fn: str) -> str | None:
    candidates: set[str] = set()
    for callback in trainer.callbacks:
        if callable(find := getattr(callback, "_find_last_checkpoints", None)):
            candidates |= {str(path) for path in find(trainer)}
        if last := getattr(callback, "last_model_path", ""):
            candidates.add(str(last))
    candidates |= _on_exception(trainer)
    there = [path for path in candidates if ckpt_file.exists(path)]
    if not there:
        _log.warning(
            "trainer.%s(ckpt_path='last'): there is no last checkpoint yet, so nothing is loaded; "
            "ModelCheckpoint(save_last=True) writes one", fn,
        )  # fmt: skip
        return None
    return max(there, key=ckpt_file.modified)


def _on_exception(trainer: Trainer) -> set[str]:
    """Files of OnExceptionCheckpoint callbacks."""
    return {
        str(callback.ckpt_path)
        for callback in trainer.callbacks
        if type(callback).__name__ == "OnExceptionCheckpoint" and hasattr(callback, "ckpt_path")
    }
