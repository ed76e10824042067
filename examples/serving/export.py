"""From the checkpoint to what each of the servers loads: python export.py digits/digits.ckpt --output digits/served"""

from __future__ import annotations

import argparse
from pathlib import Path

from digits_model import DigitsClassifier, DigitsData


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("served"))
    args = parser.parse_args()

    model = DigitsClassifier.load_from_checkpoint(args.checkpoint, map_location="cpu")
    data = DigitsData.load_from_checkpoint(args.checkpoint)

    args.output.mkdir(parents=True, exist_ok=True)
    model.to_exported_program(args.output / "model.pt2", dynamic_shapes="batch")
    model.to_onnx(args.output / "model.onnx", dynamic_shapes="batch")
    model.to_torchscript(args.output / "model.pt")
    data.save_preprocessing(args.output / "preprocessing.json")
    print(*sorted(path.name for path in args.output.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
