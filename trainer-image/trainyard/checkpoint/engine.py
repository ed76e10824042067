"""Checkpoints of one run, as the training loop sees them: resume, save when due, finish."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainyard.checkpoint.client import Uploads, open_uploads
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.deadline import Deadline
from trainyard.checkpoint.errors import CheckpointError, CommitFailed, StoreConfigError
from trainyard.checkpoint.loading import Layout
from trainyard.checkpoint.messages import Outcome, Staged
from trainyard.checkpoint.payload import Payload
from trainyard.checkpoint.resume import Loaded, Opened, Resumption
from trainyard.checkpoint.saving import Planner, save_shard
from trainyard.checkpoint.staging import StagingFolder
from trainyard.checkpoint.stores import Store, open_store
from trainyard.checkpoint.triggers import Triggers
from trainyard.peers import Peers
from trainyard_api.checkpoints import Cursor, Fenced, Record
from trainyard_api.contract import ExitCode

log = logging.getLogger("trainyard.checkpoint")

MakePayload = Callable[[], Payload]
"""Builds what this rank saves; called in the training thread."""

_FLUSH_SECONDS = 5.0
"""What a restarted worker grants to the saves of the one that died: shorter than the steps they stand for."""
_FINAL_SECONDS = 900.0
_FINAL_TRIES = 3


class Checkpointer:
    """One per process. All ranks call the same methods at the same steps, but for `emergency` and `close`."""

    def __init__(self, config: CheckpointConfig, peers: Peers, versions: Mapping[str, str]) -> None:
        self.config = config
        self._peers = peers
        self._versions = dict(versions)
        self._run = config.run_id
        self._store: Store | None = None
        self._uploads: Uploads | None = None
        self._staging = StagingFolder(target=_folder_of(config))
        self._planner = Planner()
        self._resumption: Resumption | None = None
        self._attempt = 0
        self._parent = 0
        self._committed_step = -1
        self._staged_step = -1
        self._changed = False
        self.triggers = Triggers(config, peers)
        self.deadline = Deadline()
        self.skipped = 0
        """Saves that were left out because the one before was still on its way."""
        self.stall_seconds = 0.0
        """Time that training stood still for copies, in all."""
        self._stall = 0.0

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def committed_step(self) -> int:
        """Of the newest commit that this process has heard of; -1 if of none."""
        return self._committed_step

    @property
    def in_flight(self) -> bool:
        """Whether this rank's last save is still on its way."""
        return self._uploads is not None and self._uploads.busy

    def changed(self) -> None:
        """What was resumed from has become more without a step: `finish` is to commit this step once more."""
        self._changed = True

    # ---- the start

    def open(self) -> Opened | None:
        """Collective. What the attempt goes on from, without its tensors; None: the beginning. What it raises ends the
        process: see `resume.Resumption`."""
        self._store = open_store(self.config)
        self._uploads = open_uploads(self.config, self._store, self._staging.path)
        if self._peers.rank == 0:
            self._uploads.flush(_FLUSH_SECONDS)
        self._resumption = Resumption(self._store, self.config, self._peers, self._staging.path)
        opened = self._resumption.open()
        if opened is None:
            self._started(None)
        return opened

    def load(self, layout: Layout, *, shared: bool = False) -> Loaded | None:
        """Collective, after `open` found something: its tensors. None: the beginning. `shared`: see `Resumption.load`."""
        if self._resumption is None:
            raise RuntimeError("open() comes first")
        loaded = self._resumption.load(layout, shared=shared)
        self._started(loaded)
        return loaded

    def _started(self, loaded: Loaded | None) -> None:
        resumption = self._resumption
        assert resumption is not None  # noqa: S101 - set by open()
        self._attempt = resumption.attempt
        step = 0
        if loaded is not None:
            self._parent, step = loaded.record.seq, loaded.record.step
            self._committed_step = step
        resumption.tier.announce(resumption.log_now)
        self.triggers.resumed(step, resumption.log_records)

    def prepare(self, size: int) -> None:
        """The first save will have about `size` bytes on this rank: make room for it now, beside the training. Never raises."""
        self._staging.prepare(size)

    # ---- on the way

    def due(self, step: int, *, epoch_end: bool) -> str:
        """Why to save now; empty: not now. To be asked once after every optimizer step. Raises Fenced."""
        self._look()
        return self.triggers.due(step, epoch_end=epoch_end)

    def save(
        self, step: int, cursor: Cursor, payload: MakePayload, *, reason: str = "", metrics: Mapping[str, float] | None = None
    ) -> bool:  # fmt: skip
        """Collective: copy, and leave the rest to the uploader. False when the save before is still on its way."""
        uploads = self._up()
        if self._peers.any(uploads.busy):
            self.skipped += 1
            if self._peers.rank == 0:
                log.info("step %d is not saved: the save before is still on its way", step)
            return False
        self._look()
        begin = time.monotonic()
        try:
            self._stage(step, cursor, payload(), reason, metrics)
        finally:
            self._stall = time.monotonic() - begin
            self.stall_seconds += self._stall
        self._changed = False
        self.triggers.saved(self._stall)
        return True

    def finish(
        self, step: int, cursor: Cursor, payload: MakePayload, *, reason: str = "end",
        metrics: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Collective: return when the commit of `step` is acknowledged. Raises CommitFailed, StoreConfigError, Fenced."""
        failure: dict[str, Any] | None = None
        for _ in range(_FINAL_TRIES):
            self._await_commit()
            if self._peers.broadcast(self._committed_step == step and not self._changed):
                return
            if not self.save(step, cursor, payload, reason=reason, metrics=metrics):
                continue
            failure = self._await_commit()
            if self._peers.broadcast(self._committed_step == step and not self._changed):
                return
            if failure and failure["code"] == int(ExitCode.CONFIG):
                raise StoreConfigError(
                    f"the checkpoint of step {step} was not committed: {failure['reason']}"
                )
        raise CommitFailed(
            f"the last checkpoint (step {step}) was not committed after {_FINAL_TRIES} tries: "
            f"{failure['reason'] if failure else 'no reason known'}"
        )

    def leave(
        self, step: int, cursor: Cursor, payload: MakePayload, *, seconds: float, size: int, reason: str = "stop",
        metrics: Mapping[str, float] | None = None,
    ) -> str:  # fmt: skip
        """Collective: `finish`, if there is time for it; else only the save in flight, if there is time for that.

        `seconds`: what is left, by rank 0's count; `size`: bytes of this rank's shard. What keeps `step` from being
        committed, as a sentence's part; empty: it is. Raises as `finish`.
        """
        self._look()
        plan = self.deadline.plan(seconds, size)
        done = step in (self._committed_step, self._staged_step) and not self._changed
        begins, awaits = self._peers.broadcast([plan.saves or done, plan.awaits])
        if begins:
            self.finish(step, cursor, payload, reason=reason, metrics=metrics)
            return ""
        if awaits:
            self._await_commit(seconds)
        newest = self._committed_step
        stands = (
            f"the newest checkpoint is that of step {newest}" if newest >= 0 else "there is no checkpoint"
        )
        lost = step - max(newest, 0)
        lost_are = "1 step is" if lost == 1 else f"{lost} steps are"
        why: str = self._peers.broadcast(f"{plan.why}; {stands}, {lost_are} lost")
        return why

    def emergency(
        self, step: int, cursor: Cursor, payload: MakePayload, *, reason: str, seconds: float,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:  # fmt: skip
        """Not collective: stage this rank's shard of `step` and wait up to `seconds` for the commit, of which only rank 0
        hears; the others return when theirs is uploaded. Whether that happened. Raises nothing that is about the store."""
        uploads = self._uploads
        if uploads is None:
            return False
        end = time.monotonic() + seconds
        if uploads.busy:
            self._note(uploads.take(seconds), final=True)
        if uploads.busy:
            return False
        if step in (self._committed_step, self._staged_step):  # on its way it was, and it has come through
            return True
        try:
            self._stage(step, cursor, payload(), reason, metrics)
        except (OSError, CheckpointError) as error:
            log.warning("step %d could not be saved: %s", step, error)
            return False
        outcome = self._note(uploads.take(max(0.0, end - time.monotonic())), final=True)
        return outcome is not None and outcome.op in ("committed", "uploaded")

    def close(self, *, failed: bool) -> None:
        """Not collective. After a failure, what is staged is still committed if that takes no more than seconds."""
        if self._uploads is None or not self._uploads.close():
            self._staging.close()

    # ---- in between

    def _up(self) -> Uploads:
        if self._uploads is None:
            raise RuntimeError("open() comes first")
        return self._uploads

    def _stage(
        self, step: int, cursor: Cursor, payload: Payload, reason: str, metrics: Mapping[str, float] | None
    ) -> None:
        """Raises CheckpointConfigError. A full disk only costs this save."""
        peers, uploads = self._peers, self._up()
        names: dict[str, Any] = {
            "attempt": self._attempt, "step": step, "rank": peers.rank, "world": peers.world,
        }  # fmt: skip
        begin = time.monotonic()
        try:
            file = save_shard(payload, self._staging, self._planner, **names)
        except OSError as error:
            uploads.abandon(Staged(**names, path="", size=0), f"staging failed: {error}")
            return
        head = None
        if peers.rank == 0:
            life = self.triggers.life
            head = Record(
                kind="commit", seq=0, run=self._run, attempt=self._attempt, step=step, time=time.time(), cursor=cursor,
                parent=self._parent, versions=self._versions, world_size=peers.world, reason=reason,
                metrics={k: v for k, v in (metrics or {}).items() if math.isfinite(v)},
                stall_seconds=round(time.monotonic() - begin, 6), alive_seconds=round(life.seconds, 3),
                failures=life.failures,
            )  # fmt: skip
        uploads.submit(Staged(**names, path=str(file.path), size=file.size, record=head))
        self._staged_step = step
        self.deadline.begun()

    def _await_commit(self, seconds: float = _FINAL_SECONDS) -> dict[str, Any] | None:
        """Collective: see the save in flight through; what rank 0 heard if it failed."""
        uploads = self._up()
        outcome = self._note(uploads.take(seconds if uploads.busy else 0.0), final=True)
        told: dict[str, Any] | None = None
        if outcome is not None and outcome.op == "dropped":
            told = {"reason": outcome.reason, "code": outcome.code}
        told = self._peers.broadcast(told)
        if told is not None and told["code"] == int(ExitCode.FENCED):
            raise Fenced(told["reason"])
        return told

    def _look(self) -> None:
        """Hear what became of the save in flight, without waiting. Raises Fenced."""
        self._note(self._up().take(), final=False)

    def _note(self, outcome: Outcome | None, *, final: bool) -> Outcome | None:
        if outcome is None:
            return None
        if outcome.op == "committed":
            self._committed_step = outcome.step
            log.info("checkpoint of step %d committed: %s", outcome.step, outcome.uri)
        elif outcome.op == "dropped":
            if outcome.code == int(ExitCode.FENCED) and not final:
                raise Fenced(outcome.reason)
            self._staged_step = -1
            self.deadline.dropped()
            log.warning("the checkpoint of step %d was not committed: %s", outcome.step, outcome.reason)
        if outcome.op != "dropped":
            self._staging.prepare(outcome.size)
            self.triggers.committed(outcome.seconds)
            self.deadline.saw(self._stall, outcome.seconds, outcome.size)
        return outcome


def _folder_of(config: CheckpointConfig) -> Path | None:
    """Of a directory: what is staged on its own file system need not be copied."""
    return Path(config.uri.removeprefix("file://")) if config.uri.startswith("file:///") else None
