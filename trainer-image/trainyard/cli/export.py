"""`trainyard export`: the model of a configuration, with a checkpoint's weights, as a file to serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainyard.cli.build import arguments_of, build, class_of
from trainyard.cli.errors import CliError
from trainyard.cli.lightning_cli import fail
from trainyard.cli.main import PROG
from trainyard.cli.parser import ArgumentParser, Section
from trainyard.errors import MisconfigurationException
from trainyard.utilities.convert import ConversionError

_NAME = f"{PROG} export"
_OTHERS = ("data", "trainer", "optimizer", "lr_scheduler", "seed_everything", "weights_only")
"""Sections that a configuration of a fit has, and that are of no use here."""


def export(words: Sequence[str]) -> int:
    """Raises SystemExit with one line for what is wrong."""
    from trainyard.checkpoint.errors import CheckpointError

    try:
        return _export(words)
    except (MisconfigurationException, CheckpointError, ImportError, OSError) as error:
        fail(_NAME, error)


def _export(words: Sequence[str]) -> int:
    from trainyard.cli.help import sections_help
    from trainyard.utilities.yaml import dump

    parser = _parser()
    arguments = parser.arguments(words)
    config = parser.config(arguments, "export")
    if arguments.help:
        print(sections_help(_NAME, parser, config))
        return 0
    described = {k: v for k, v in parser.describe(config).items() if k not in _OTHERS}
    if arguments.print_config:
        print(dump(described), end="")
        return 0
    for needed in ("ckpt_path", "output"):
        if described[needed] is None:
            raise CliError(f"--{needed} is missing")
    print(_write(config.get("model"), described))
    return 0


def _parser() -> ArgumentParser:
    from trainyard.core.module import LightningModule

    parser = ArgumentParser(("fit", "validate", "test", "predict", "export"))
    parser.add_section(Section("model", "The module", cls=LightningModule, subclasses=True, required=True))
    parser.add_argument(
        "--ckpt_path", type=str | None, help="A .ckpt file, or where a TrainingRun saves: <uri>/<uid>"
    )
    parser.add_argument("--output", type=str | None, help="The file to write; its suffix says the format")
    parser.add_argument("--format", type=str | None, help="onnx, torchscript, pt2, safetensors or state_dict")
    parser.add_argument(
        "--dynamic_batch", type=bool, default=False, help="onnx and pt2: for batches of any size"
    )
    for key in _OTHERS:
        parser.add_argument(f"--{key}", help="Of a fit; not used here")
    return parser


def _write(model: Any, config: dict[str, Any]) -> Any:
    """Arguments of the configuration override those in the checkpoint."""
    from trainyard.core.module import LightningModule
    from trainyard.export import export_checkpoint

    try:
        cls, given = class_of(model, LightningModule, "model")
    except ConversionError as error:
        raise CliError(f"{error.place}: {error.problem}") from None
    options: dict[str, Any] = {"dynamic_shapes": "batch"} if config["dynamic_batch"] else {}
    return export_checkpoint(
        cls, config["ckpt_path"], config["output"], config["format"],
        arguments=arguments_of(cls, given, "model", make=build), **options,
    )  # fmt: skip
