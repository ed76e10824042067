# mypy: ignore-errors
"""As a user of Lightning writes it: module, data module, the usual callbacks, CSV files; fit, test the best, predict."""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


class Blobs(L.LightningDataModule):
    def __init__(self, batch_size: int = 16, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str):
        generator = torch.Generator().manual_seed(7)
        centres = torch.randn(self.hparams.classes, 8, generator=generator)
        labels = torch.randint(self.hparams.classes, (320,), generator=generator)
        points = centres[labels] + 0.9 * torch.randn(320, 8, generator=generator)
        whole = TensorDataset(points, labels)
        self.train_set, self.val_set, self.test_set = random_split(whole, [192, 64, 64], generator)

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.hparams.batch_size)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.test_set, batch_size=self.hparams.batch_size)

    def predict_dataloader(self):
        return DataLoader(self.test_set, batch_size=self.hparams.batch_size)


class Classifier(L.LightningModule):
    def __init__(self, width: int = 16, classes: int = 3, lr: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, x):
        return self.net(x)

    def _step(self, batch, stage):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        accuracy = (logits.argmax(-1) == y).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": accuracy}, prog_bar=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def on_validation_epoch_end(self):
        self.log("val_perplexity", self.trainer.callback_metrics["val_loss"].exp())

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


L.seed_everything(11, workers=True)
model, data = Classifier(), Blobs()
best = ModelCheckpoint(
    monitor="val_loss", filename="{epoch:02d}-{val_loss:.2f}", save_top_k=2, save_last=True, mode="min"
)
early = EarlyStopping("val_loss", patience=2, min_delta=0.02)
trainer = L.Trainer(
    max_epochs=30,
    accelerator="cpu",
    devices=1,
    callbacks=[best, early, LearningRateMonitor("step")],
    logger=CSVLogger("logs", name="blobs"),
    accumulate_grad_batches=2,
    gradient_clip_val=0.5,
    log_every_n_steps=4,
    deterministic=True,
    enable_progress_bar=False,
)
trainer.fit(model, datamodule=data)
fitted = {"step": trainer.global_step, "epoch": trainer.current_epoch, "stopped": early.stopped_epoch}
fitted["metrics"] = sorted(trainer.callback_metrics)
(tested,) = trainer.test(model, datamodule=data, ckpt_path="best")
predicted = torch.cat(trainer.predict(model, datamodule=data))
again = Classifier.load_from_checkpoint(best.best_model_path, map_location="cpu")
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
final = torch.load(best.last_model_path, weights_only=True)["state_dict"]
