# mypy: ignore-errors
"""As a user of the older package writes it: several validation loaders, a scheduler that waits for a metric, steps as the
end, validations within the epoch, a torchmetrics object, hooks that log."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError


def batches(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8)


class Regression(pl.LightningModule):
    def __init__(self, hidden=12, optimizer=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)
        )
        self.error = MeanAbsoluteError()

    def training_step(self, batch, batch_idx):
        x, y = batch
        predicted = self.net(x)
        loss = torch.nn.functional.mse_loss(predicted, y)
        self.error(predicted, y)
        self.log("mae", self.error, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "predicted": predicted.detach()}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.log("val_loss", loss)
        self.losses.append(loss)

    def on_before_optimizer_step(self, optimizer):
        self.log("lr", optimizer.param_groups[0]["lr"], on_step=True)

    def on_validation_epoch_start(self):
        self.losses = []

    def on_validation_epoch_end(self):
        self.log("watched", torch.stack(self.losses).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), **self.hparams.optimizer)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=0, threshold=0.05
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "watched", "interval": "epoch", "frequency": 1},
        }


pl.seed_everything(5)
model = Regression(optimizer={"lr": 0.2, "momentum": 0.9})
seen = []
best = ModelCheckpoint(
    "kept", monitor="val_loss/dataloader_idx_1", filename="{step}", every_n_train_steps=10, save_top_k=2
)
trainer = pl.Trainer(
    max_steps=45,
    accelerator="cpu",
    devices="auto",
    val_check_interval=0.5,
    limit_train_batches=12,
    num_sanity_val_steps=1,
    log_every_n_steps=3,
    callbacks=[
        LambdaCallback(on_validation_end=lambda trainer, module: seen.append(trainer.global_step)),
        best,
    ],
    logger=CSVLogger("tables"),
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, batches(1, 160), [batches(2, 16), batches(3, 24)])
fitted = {"step": trainer.global_step, "validated_at": seen, "metrics": sorted(trainer.callback_metrics)}
validated = trainer.validate(model, [batches(2, 16), batches(3, 24)])
final = model.state_dict()
