"""A GAN that draws handwritten digits (scikit-learn's 8x8 images): two optimizers that the module steps itself.

    python train.py --epochs 60 --checkpoint file:///tmp/gan

Runs on a laptop, under torchrun and in a TrainingRun. What it draws goes to TensorBoard at each epoch's end, where that
is installed, and to `--picture` as text.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainyard as L

SHADES = " .:-=+*#%@"


class Gan(L.LightningModule):
    """The generator learns what the critic takes for a digit."""

    def __init__(self, latent: int = 16, hidden: int = 128, lr: float = 2e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.latent, self.lr = latent, lr
        self.generator = nn.Sequential(
            nn.Linear(latent, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2),
            nn.Linear(hidden, 64), nn.Sigmoid(),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Linear(64, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )
        # A buffer, so that the same eight faces are looked at after a resume.
        self.register_buffer("probe", torch.randn(8, latent))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.generator(noise)  # type: ignore[no-any-return]

    def judge(self, images: torch.Tensor, real: float) -> torch.Tensor:
        scores = self.critic(images)
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (images,) = batch
        for_generator, for_critic = self.optimizers()
        noise = torch.randn(len(images), self.latent, device=self.device)

        with self.toggled_optimizer(for_generator):
            drawn = self(noise)
            generator_loss = self.judge(drawn, 1.0)
            for_generator.zero_grad()
            self.manual_backward(generator_loss)
            for_generator.step()

        with self.toggled_optimizer(for_critic):
            critic_loss = (self.judge(images, 0.9) + self.judge(drawn.detach(), 0.0)) / 2
            for_critic.zero_grad()
            self.manual_backward(critic_loss)
            for_critic.step()

        self.log_dict({"generator_loss": generator_loss, "critic_loss": critic_loss}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()
        board = getattr(self.logger, "experiment", None)
        if self.trainer.is_global_zero and callable(add_image := getattr(board, "add_image", None)):
            add_image("drawn", self.drawn(), self.current_epoch, dataformats="HW")

    @torch.no_grad()
    def drawn(self) -> torch.Tensor:
        """(8, 64): eight images side by side, from 0 to 1."""
        return torch.cat(list(self.generator(self.probe).view(-1, 8, 8)), dim=1)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(part.parameters(), self.lr, betas=(0.5, 0.999))
            for part in (self.generator, self.critic)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.995) for o in optimizers]


def as_text(picture: torch.Tensor) -> str:
    """Two characters a pixel."""
    rows = (picture.clamp(0, 1) * (len(SHADES) - 1)).round().long().tolist()
    return "\n".join("".join(SHADES[shade] * 2 for shade in row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64, help="per process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", help="outside of a TrainingRun: s3://bucket/prefix or file:///folder")
    parser.add_argument("--picture", action="store_true", help="print at the end what it draws")
    args = parser.parse_args()

    L.seed_everything(args.seed)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images), args.batch_size, shuffle=True, drop_last=True)
    trainer = L.Trainer(
        max_epochs=args.epochs, strategy="ddp_find_unused_parameters_true",
        checkpoint=L.CheckpointConfig(uri=args.checkpoint) if args.checkpoint else None,
    )  # fmt: skip
    model = Gan()
    trainer.fit(model, loader)
    if args.picture:
        trainer.print(as_text(model.cpu().drawn()))


if __name__ == "__main__":
    main()
