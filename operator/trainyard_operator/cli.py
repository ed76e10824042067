"""The command line: `run`, `version`, `metrics-doc`."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from typing import Any

import click

from trainyard_operator import log, settings
from trainyard_operator.settings import VARIABLES


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """The Trainyard operator: trains PyTorch models on many nodes and does not lose work."""


@cli.command(short_help="Run the operator until SIGTERM.")
def run(**flags: str | None) -> None:
    """Run the operator until SIGTERM.

    Every option can also be given as an environment variable, which is named with it; an option wins. In a
    pod nothing needs to be given when the certificate is mounted at /etc/trainyard/tls.

    Exit codes: 0 asked to stop; 1 a part failed or the lease was lost; 2 a setting is wrong; 3 the cluster
    does not have the TrainingRun CRD.
    """
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    try:
        loaded = settings.load(os.environ, given)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    log.setup(loaded.log_level, loaded.log_format)
    from trainyard_operator import app  # kopf and aiohttp: half a second that --help and version do not need

    code = app.main(loaded)
    logging.shutdown()
    sys.exit(code)


for _variable in VARIABLES:
    run = click.option(f"--{_variable.name}", metavar="VALUE", help=f"{_variable.text}  ({_variable.env})")(
        run
    )


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(release())


@cli.command("metrics-doc")
def metrics_doc() -> None:
    """Print docs/metrics.md: every metric of the operator."""
    from trainyard_operator.metrics_doc import render

    click.echo(render(), nl=False)


def release() -> str:
    """The version of the installed package; "unknown" in a source tree that is not installed."""
    try:
        return importlib.metadata.version("trainyard")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def main(args: list[str] | None = None) -> Any:
    """Entry point of `trainyard-operator`. Exits with 2 when a setting is wrong."""
    try:
        return cli.main(args, prog_name="trainyard-operator", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(1)
