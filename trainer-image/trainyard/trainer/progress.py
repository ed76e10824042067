"""How fast training goes, and the word of it to the agent."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LOSS_SECONDS = 0.1
_WINDOW_SECONDS = 1.0


def agent_client() -> Any:
    """The connection to this pod's agent; None on a laptop."""
    try:
        from trainyard.elastic.client import AgentClient
    except ImportError:
        return None
    return AgentClient.from_env()


class Progress:
    """Of one rank. Reading the loss of a CUDA device would wait for it: there it is only known after a flush."""

    def __init__(self, agent: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._agent = agent
        self._clock = clock
        self._read = float("-inf")
        self._since: float | None = None
        self._samples = 0
        self.samples_per_second: float | None = None
        """Over all ranks, of the last second or so."""
        self.loss: float | None = None

    def resumed(self, *, step: int, uri: str, fell_back: str) -> None:
        if self._agent is not None:
            self._agent.resumed(step=step, uri=uri, fell_back=fell_back)

    def stepped(
        self,
        *,
        step: int,
        total: int | None,
        epoch: int,
        samples: int,
        loss: torch.Tensor | None,
        flush: bool,
    ) -> None:
        """After an optimizer step that used `samples` samples of all ranks."""
        now = self._clock()
        if self._since is None:
            self._since = now  # the first step also pays for all that comes before it
        else:
            self._samples += samples
            if now - self._since >= _WINDOW_SECONDS or (
                self.samples_per_second is None and now > self._since
            ):
                self.samples_per_second = self._samples / (now - self._since)
            if now - self._since >= _WINDOW_SECONDS:
                self._since, self._samples = now, 0
        # On the CPU the number is there already; even so, reading it at every step of a tiny model costs something.
        cheap = loss is not None and loss.device.type == "cpu" and now - self._read >= _LOSS_SECONDS
        if loss is not None and (flush or cheap):
            self.loss, self._read = float(loss), now
        if self._agent is not None:
            self._agent.progress(
                step=step,
                total_steps=total,
                epoch=epoch,
                loss=self.loss,
                samples_per_second=self.samples_per_second,
            )
