"""fit, validate, test, predict: LightningCLI with whatever classes the configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from trainyard.cli.main import PROG


def _run(verb: str, words: Sequence[str]) -> int:
    from trainyard.cli.lightning_cli import LightningCLI

    LightningCLI(args=[verb, *words], prog=PROG)
    return 0


fit = partial(_run, "fit")
validate = partial(_run, "validate")
test = partial(_run, "test")
predict = partial(_run, "predict")
