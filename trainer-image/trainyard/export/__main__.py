"""python -m trainyard.export --module my.package:MyModule --checkpoint last.ckpt --output model.onnx"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from trainyard.checkpoint.errors import CheckpointError
from trainyard.errors import MisconfigurationException
from trainyard.export.dispatch import FORMATS, export_checkpoint, format_of
from trainyard.export.errors import ExportError
from trainyard.export.runs import checkpoint_of_run


def main(arguments: list[str] | None = None) -> int:
    """Export a checkpoint, or turn the newest one of a TrainingRun into a single file."""
    parser = argparse.ArgumentParser(prog="python -m trainyard.export", description=main.__doc__)
    parser.add_argument(
        "--checkpoint", required=True,
        help="a .ckpt file, or where a run saves: <uri>/<uid>, or one of its commits",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="the file to write; its suffix says the format")
    parser.add_argument("--module", help="the LightningModule, as package.module:Class; not needed for .ckpt")
    parser.add_argument("--format", choices=FORMATS, help="if the suffix does not say it")
    parser.add_argument("--dynamic-batch", action="store_true", help="onnx and pt2: for batches of any size")
    options = parser.parse_args(arguments)
    try:
        if options.module is None and options.format is None and options.output.endswith(".ckpt"):
            step = checkpoint_of_run(options.checkpoint, options.output)
            print(f"{options.output}: step {step} of {options.checkpoint}")
            return 0
        format_of(options.output, options.format)
        more: dict[str, Any] = {"dynamic_shapes": "batch"} if options.dynamic_batch else {}
        path = export_checkpoint(
            _class(options.module), options.checkpoint, options.output, options.format, **more
        )
        print(path)
    except (MisconfigurationException, CheckpointError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _class(name: str | None) -> Any:
    if name is None:
        raise ExportError("--module is needed: package.module:Class")
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ValueError, AttributeError) as error:
        raise ExportError(f"--module: {name!r} is not package.module:Class ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
