"""Hooks that a module or a data module may override. All do nothing, as Lightning's do."""

from __future__ import annotations

from typing import Any


class DataHooks:
    """In modules and data modules. If both have one, the data module's is used."""

    prepare_data_per_node: bool = True
    """Whether each node's local rank 0 prepares, or rank 0 alone."""

    def prepare_data(self) -> None:
        """Download and the like: on local rank 0 of each node (or on rank 0 alone), before `setup`. Set no state."""

    def setup(self, stage: str) -> None:
        """On every rank. `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """On every rank, last."""

    def train_dataloader(self) -> Any:
        """A DataLoader, anything that can be iterated, or a list, dict or CombinedLoader of them."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """One loader or a list of them."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """One loader or a list of them."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """One loader or a list of them."""
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the batch as the loader gave it. Returns the batch."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Moves tensors in collections, and whatever has a `to`. Returns the batch."""
        from trainyard.data.batches import to_device

        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the batch on its device: augmentation, normalisation. Returns the batch."""
        return batch


class ModelHooks:
    """In modules, in the order in which they are called."""

    def on_fit_start(self) -> None:
        """The first of these; what a checkpoint holds of the optimizers is loaded afterwards."""

    def on_train_start(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """-1 skips the rest of the epoch."""
        return None

    def on_before_zero_grad(self, optimizer: Any) -> None:
        """Once for an optimizer step, before its first backward pass."""

    def on_before_backward(self, loss: Any) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """All gradients are there, at their true scale, and not clipped yet."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_train_epoch_end(self) -> None:
        """After the validation that falls on the end of the epoch."""

    def on_train_end(self) -> None: ...
    def on_fit_end(self) -> None: ...

    # ---- validation

    def on_validation_model_eval(self) -> None:
        """Puts the module into evaluation mode."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_zero_grad(self) -> None:
        """Before a validation within a fit: frees the gradients' memory."""
        self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_start(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_model_train(self) -> None:
        """Afterwards. The loop itself puts every submodule back into the mode that it had."""

    # ---- test

    def on_test_model_eval(self) -> None:
        """Puts the module into evaluation mode."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_start(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_model_train(self) -> None:
        """Afterwards. The loop itself puts every submodule back into the mode that it had."""

    # ---- predict

    def on_predict_model_eval(self) -> None:
        """Puts the module into evaluation mode."""
        self.eval()  # type: ignore[attr-defined]

    def on_predict_start(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_model_train(self) -> None:
        """Afterwards. The loop itself puts every submodule back into the mode that it had."""

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to `checkpoint` what `on_load_checkpoint` wants back: tensors and primitives."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the weights are loaded."""
