"""Prediction: the module's answers, loader by loader, batch by batch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from trainyard.data.loader import Feed
from trainyard.data.transfer import Transfer
from trainyard.loops.evaluation import eval_step, evaluating

if TYPE_CHECKING:
    from trainyard.trainer.trainer import Trainer


class PredictionLoop:
    """`Trainer.predict_loop`: prediction writers read `predictions`, `epoch_batch_indices`, `current_batch_indices`."""

    def __init__(self, trainer: Trainer, *, return_predictions: bool) -> None:
        self.trainer = trainer
        self.return_predictions = return_predictions
        self.predictions: list[list[Any]] = []
        """By loader, by batch of this rank."""
        self.epoch_batch_indices: list[list[list[int]]] = []
        """By loader, by batch: the samples' positions in the dataset; empty lists where a loader does not tell."""
        self.current_batch_indices: list[int] = []
        self._transfer = Transfer(trainer)

    def run(self, feeds: list[Feed]) -> list[Any] | list[list[Any]] | None:
        """Of one loader: a list of its batches' answers; of several: a list of those."""
        trainer, call = self.trainer, self.trainer.hooks
        call.refresh()
        with evaluating(trainer, "predict"):
            call("on_predict_start")
            call("on_predict_epoch_start")
            for number, feed in enumerate(feeds):
                self._run_loader(number, feed, several=len(feeds) > 1)
            call("on_predict_epoch_end")
            call("on_predict_end")
        if not self.return_predictions:
            return None
        return self.predictions if len(feeds) != 1 else self.predictions[0]

    def _run_loader(self, number: int, feed: Feed, *, several: bool) -> None:
        trainer, call = self.trainer, self.trainer.hooks
        step = eval_step(trainer, "predict_step", several=several)
        together = trainer.strategy.forward_is_collective
        answers: list[Any] = []
        indices: list[list[int]] = []
        self.predictions.append(answers)
        self.epoch_batch_indices.append(indices)
        with contextlib.closing(feed.iterate(0, 0)) as batches:  # type: ignore[type-var]
            for index, (plan, raw) in enumerate(batches):
                if plan.padding and not together:
                    continue
                trainer.is_last_batch = plan.last
                batch = self._transfer(raw, number)
                self.current_batch_indices = feed.indices(plan)
                args = (batch, index, number) if several else (batch, index)
                call("on_predict_batch_start", *args)
                answer = step(batch, index, number)
                call("on_predict_batch_end", answer, *args)
                if plan.padding:
                    continue
                indices.append(self.current_batch_indices)
                if self.return_predictions:
                    answers.append(answer)
