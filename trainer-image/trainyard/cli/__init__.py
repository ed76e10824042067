"""The command line: `trainyard fit --config run.yaml`, and LightningCLI for scripts. Imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainyard.cli.errors import CliError
    from trainyard.cli.lightning_cli import LightningCLI
    from trainyard.cli.parser import ArgumentParser as LightningArgumentParser
    from trainyard.cli.save_config import SaveConfigCallback

_WHERE = {
    "CliError": ("errors", "CliError"),
    "LightningArgumentParser": ("parser", "ArgumentParser"),
    "LightningCLI": ("lightning_cli", "LightningCLI"),
    "SaveConfigCallback": ("save_config", "SaveConfigCallback"),
}

__all__ = ["CliError", "LightningArgumentParser", "LightningCLI", "SaveConfigCallback"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return globals().setdefault(name, getattr(import_module(f"{__name__}.{module}"), attribute))
