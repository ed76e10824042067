# mypy: ignore-errors
"""As a user of Lightning writes it: two optimizers in manual optimization, a callback with state, TensorBoard, and a
second fit that goes on from a file of the first."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader


class Adversaries(pl.LightningModule):
    def __init__(self, lr: float = 0.02):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(2, 4), nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        noise, real = batch[:, :2], batch

        self.toggle_optimizer(first)
        made = self.maker(noise)
        maker_loss = nn.functional.softplus(-self.judge(made)).mean()
        first.zero_grad()
        self.manual_backward(maker_loss)
        first.step()
        self.untoggle_optimizer(first)

        if batch_idx % 2 == 0:
            self.toggle_optimizer(second)
            judge_loss = (
                nn.functional.softplus(-self.judge(real)) + nn.functional.softplus(self.judge(made.detach()))
            ).mean()
            second.zero_grad()
            self.manual_backward(judge_loss)
            self.clip_gradients(second, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            second.step()
            self.untoggle_optimizer(second)
            self.log("judge_loss", judge_loss)
        self.log("maker_loss", maker_loss, prog_bar=True, on_step=True, on_epoch=True)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [
            torch.optim.SGD(part.parameters(), lr=self.hparams.lr) for part in (self.maker, self.judge)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


class Counter(Callback):
    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]


pl.seed_everything(3)
loader = DataLoader(torch.randn(64, 4), batch_size=8)


def train(epochs, ckpt_path=None):
    counter = Counter()
    keep = ModelCheckpoint("kept", filename="{epoch}-{step}", every_n_epochs=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[counter, keep],
        logger=TensorBoardLogger("boards", name="adversaries"), log_every_n_steps=4, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    model = Adversaries()
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer, model, counter


trainer, model, counter = train(2)
trainer, model, counter = train(4, ckpt_path=trainer.checkpoint_callback.best_model_path)
fitted = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batches": counter.batches}
best = trainer.checkpoint_callback
final = model.state_dict()
