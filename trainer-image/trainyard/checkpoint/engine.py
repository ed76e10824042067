"""Checkpoints of one run, as the training loop sees them: resume, save when due, finish."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from trainyard.checkpoint.client import Uploads, open_uploads
from trainyard.checkpoint.config import CheckpointConfig
from trainyard.checkpoint.errors import CheckpointError, CommitFailed, StoreConfigError
from trainyard.checkpoint.messages import Outcome, Staged
from trainyard.checkpoint.resume import Loaded, resume
from trainyard.checkpoint.snapshot import freeze
from trainyard.checkpoint.staging import StagingFolder, write_shard
from trainyard.checkpoint.stores import Store, open_store
from trainyard.checkpoint.triggers import StepTrigger, TimeTrigger
from trainyard.peers import Peers
from trainyard_api.checkpoints import Cursor, Fenced, Record
from trainyard_api.contract import ExitCode

log = logging.getLogger("trainyard.checkpoint")

Payload = Callable[[], Mapping[str, Any]]
"""Builds what this rank saves; called in the training thread."""

_FLUSH_SECONDS = 5.0
"""What a restarted worker grants to the saves of the one that died: shorter than the steps they stand for."""
_FINAL_SECONDS = 900.0
_FINAL_TRIES = 3
_STAGE_SECONDS = 10.0


class Checkpointer:
    """One per process. All ranks call the same methods at the same steps."""

    def __init__(self, config: CheckpointConfig, peers: Peers, versions: Mapping[str, str]) -> None:
        self._config = config
        self._peers = peers
        self._versions = dict(versions)
        self._run = config.run_id
        self._store: Store | None = None
        self._uploads: Uploads | None = None
        self._staging = StagingFolder()
        self._writer: threading.Thread | None = None
        self._attempt = 0
        self._parent = 0
        self._committed_step = -1
        self._changed = False
        self._steps = StepTrigger(config.every_n_steps) if config.every_n_steps else None
        self._time: TimeTrigger | None = None
        self.skipped = 0
        """Saves that were left out because the one before was still on its way."""
        self.stall_seconds = 0.0
        """Time that training stood still for copies, in all."""

    @property
    def attempt(self) -> int:
        return self._attempt

    @property
    def committed_step(self) -> int:
        """Of the newest commit that this process has heard of; -1 if of none."""
        return self._committed_step

    def changed(self) -> None:
        """What was resumed from has become more without a step: `finish` is to commit this step once more."""
        self._changed = True

    def resume(self) -> Loaded:
        """Collective. What it raises ends the process: see `resume.resume`."""
        self._store = open_store(self._config)
        self._uploads = open_uploads(self._config, self._store, self._staging.path)
        if self._peers.rank == 0:
            self._uploads.flush(_FLUSH_SECONDS)
        loaded = resume(self._store, self._run, self._config.attempt, self._peers, self._staging.path)
        self._attempt = loaded.attempt
        if loaded.record is not None:
            self._parent, self._committed_step = loaded.record.seq, loaded.record.step
            if self._steps is not None:
                self._steps.seen = loaded.record.step
        if self._config.every_n_seconds is not None:
            self._time = TimeTrigger(
                self._config.every_n_seconds, leader=self._peers.rank == 0,
                broadcast=lambda verdict: tuple(self._peers.broadcast(verdict)),
            )  # fmt: skip
        return loaded

    def due(self, step: int, *, epoch_end: bool) -> bool:
        """Whether to save now; to be asked once after every optimizer step. Raises Fenced."""
        self._look()
        if self._steps is None and self._time is None:
            return epoch_end
        by_step = self._steps is not None and self._steps.due(step)
        by_time = self._time is not None and self._time.due(step)
        return by_step or by_time

    def save(self, step: int, cursor: Cursor, payload: Payload) -> bool:
        """Collective: copy, and let a thread write and upload. False when the save before is still on its way."""
        uploads = self._up()
        if self._peers.any(uploads.busy or self._writing()):
            self.skipped += 1
            if self._peers.rank == 0:
                log.info("step %d is not saved: the save before is still on its way", step)
            return False
        self._look()
        begin = time.monotonic()
        frozen = freeze(dict(payload()))
        self._changed = False
        self.stall_seconds += time.monotonic() - begin
        self._writer = threading.Thread(
            target=self._stage, args=(uploads, frozen, step, cursor), name=f"stage-{step}", daemon=True
        )
        self._writer.start()
        if self._time is not None:
            self._time.saved()
        return True

    def finish(self, step: int, cursor: Cursor, payload: Payload) -> None:
        """Collective: return when the commit of `step` is acknowledged. Raises CommitFailed, StoreConfigError, Fenced."""
        failure: dict[str, Any] | None = None
        for _ in range(_FINAL_TRIES):
            self._await_commit()
            if self._peers.broadcast(self._committed_step == step and not self._changed):
                return
            if not self.save(step, cursor, payload):
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

    def close(self, *, failed: bool) -> None:
        """Not collective. After a failure, what is staged is still committed if that takes no more than seconds."""
        if self._uploads is not None:
            if failed and self._writer is not None:
                self._writer.join(_STAGE_SECONDS)
            self._uploads.close()
        self._staging.close()

    def _up(self) -> Uploads:
        if self._uploads is None:
            raise RuntimeError("resume() comes first")
        return self._uploads

    def _writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _await_commit(self) -> dict[str, Any] | None:
        """Collective: see the save in flight through; what rank 0 heard if it failed."""
        if self._writer is not None:
            self._writer.join(_FINAL_SECONDS)
        uploads = self._up()
        outcome = self._note(uploads.take(_FINAL_SECONDS if uploads.busy else 0.0), final=True)
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
            log.warning("the checkpoint of step %d was not committed: %s", outcome.step, outcome.reason)
        return outcome

    def _stage(self, uploads: Uploads, frozen: dict[str, Any], step: int, cursor: Cursor) -> None:
        """In the writer's thread."""
        peers, head = self._peers, None
        if peers.rank == 0:
            head = Record(
                kind="commit", seq=0, run=self._run, attempt=self._attempt, step=step, time=time.time(), cursor=cursor,
                parent=self._parent, versions=self._versions, world_size=peers.world,
            )  # fmt: skip
        names: dict[str, Any] = {
            "attempt": self._attempt,
            "step": step,
            "rank": peers.rank,
            "world": peers.world,
        }
        try:
            file = write_shard(frozen, self._staging.path, **names)
        except (OSError, RuntimeError, CheckpointError) as error:
            uploads.abandon(Staged(**names, path="", size=0, sha256=""), f"staging failed: {error}")
            return
        uploads.submit(Staged(**names, path=str(file.path), size=file.size, sha256=file.sha256, record=head))
