"""A save when a rank has failed, of the last step that was complete: each rank for itself, for nobody can be waited for.

The rank that raised does it on its way out. The main threads of the others hang in a reduction that will never be complete, so
there the watcher's thread does it. How a rank knows that its state is sound: `loops.latch`. That all ranks have the
same step is said through the store that they met at (`agree`), within seconds; else nothing is written.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainyard.checkpoint.errors import CheckpointError
from trainyard.data.once import warn_once
from trainyard.failure.errors import SIGTERMException
from trainyard.loops.latch import Latch
from trainyard.trainer.moment import Moment, Moments
from trainyard_api.checkpoints import Fenced

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer

_log = logging.getLogger("trainyard.checkpoint")
_COMPLETE_SECONDS = 1.0
"""How long a rank that is told of a failure may take to complete the step that it is at."""
_AGREE_SECONDS = 3.0
Agree = Callable[[str, float], list[str]]
"""(this rank's word, seconds) -> everybody's, by rank. Raises RuntimeError when not all have said theirs by then."""


class Rescue:
    """Of one fit with `CheckpointConfig.on_exception`.

    It costs each step the copies of `Moment`: 0.2 ms of one CPU core for a small module, 0.6 ms with twenty batch norms.
    With several processes on CUDA also a wait for the device before each optimizer step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._latch: Latch[Moment] = Latch()
        self._moments = Moments(trainer)
        self._once = threading.Lock()
        self._tried = False
        self._waits_for_device = trainer.world_size > 1 and trainer.strategy.device.type == "cuda"

    @classmethod
    def of(cls, trainer: Trainer) -> Rescue | None:
        """None where it was not asked for, or cannot be; the log says why."""
        checkpointer = trainer.checkpointer
        if checkpointer is None or not checkpointer.config.on_exception:
            return None
        rescue = cls(trainer)
        if why := rescue._moments.obstacle():
            if trainer.is_global_zero:
                warn_once(f"nothing will be saved on an exception: {why}")
            return None
        return rescue

    # ---- the loop's side

    def complete(self, *, validates: bool = False) -> None:
        """After each step, when all that belongs to it is done. `validates`: but for the validation."""
        self._latch.complete(self._moments.take(validates=validates))

    def changes(self) -> None:
        """Right before the weights begin to change, or what cannot be taken back. Raises PeerFailed."""
        if (
            self._waits_for_device
        ):  # else the host would be a step ahead of a reduction that may never be complete
            import torch

            torch.cuda.current_stream().synchronize()
        self._latch.changes()

    # ---- the watcher's side

    def __call__(self, error: BaseException | None, seconds: float, agree: Agree | None) -> None:
        """Never raises. `error`: this rank's, in its main thread; None in another thread, when another rank failed."""
        with self._once:  # who comes second waits, and goes on with its end
            if self._tried or isinstance(error, SIGTERMException | CheckpointError | Fenced):
                return
            self._tried = True
            try:
                self._save(error is None, seconds, agree)
            except Exception as problem:
                _log.warning("nothing was saved on the exception: %s: %s", type(problem).__name__, problem)

    def _save(self, told: bool, seconds: float, agree: Agree | None) -> None:
        trainer, checkpointer = self._trainer, self._trainer.checkpointer
        if checkpointer is None:
            return
        moment = self._latch.hold(_COMPLETE_SECONDS if told else 0.0)
        words = [moment.word if moment is not None else ""]
        if trainer.world_size > 1:
            if agree is None:
                return
            words = agree(words[0], min(_AGREE_SECONDS, seconds))
        if moment is None or len(set(words)) > 1:
            if moment is not None or not any(words):
                _log.warning("nothing is saved on the exception: %s", _odd(words))
            return
        loop = moment.loop
        with _beside_what_hangs(trainer) if told else contextlib.nullcontext():
            saved = checkpointer.emergency(
                loop.step, loop.cursor, lambda: self._moments.payload(moment), reason="exception", seconds=seconds,
                metrics=moment.metrics,
            )  # fmt: skip
        if trainer.is_global_zero:
            came = "is saved" if saved else f"was not committed within {seconds:.1f} s"
            _log.warning("step %d, the last one before the exception, %s", loop.step, came)


def _odd(words: list[str]) -> str:
    steps = [f"rank {rank}: {word.split('/')[0]}" for rank, word in enumerate(words) if word]
    unsound = [str(rank) for rank, word in enumerate(words) if not word]
    said = f"the last complete steps are {', '.join(steps)}" if steps else ""
    if unsound:
        torn = f"rank {', '.join(unsound)} was in the middle of what belongs to a step"
        said = f"{said}, and {torn}" if said else torn
    return said


@contextlib.contextmanager
def _beside_what_hangs(trainer: Trainer) -> Iterator[Any]:
    """On a device, work is done in the order in which it was given: not behind a reduction that will never be complete."""
    if trainer.strategy.device.type != "cuda":
        yield
        return
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        yield
