"""Train the classifier and leave one checkpoint file: python train.py --output digits"""

from __future__ import annotations

import argparse
from pathlib import Path

from digits_model import DigitsClassifier, DigitsData

import trainyard as L


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("digits"))
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    L.seed_everything(1)
    trainer = L.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(DigitsClassifier(), datamodule=DigitsData())
    trainer.print(f"validation accuracy {float(trainer.callback_metrics['val_accuracy']):.3f}")
    trainer.save_checkpoint(args.output / "digits.ckpt")


if __name__ == "__main__":
    main()
