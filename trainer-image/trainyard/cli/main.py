"""`trainyard VERB ...`: a table of verbs, each imported when it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

PROG = "trainyard"


class Verb(NamedTuple):
    """`module.function(words) -> exit code`; the words are those after the verb."""

    module: str
    function: str
    words: str


VERBS: Mapping[str, Verb] = {
    "fit": Verb("trainyard.cli.run", "fit", "train a model as a configuration says"),
    "validate": Verb("trainyard.cli.run", "validate", "one epoch of validation"),
    "test": Verb("trainyard.cli.run", "test", "one epoch of test"),
    "predict": Verb("trainyard.cli.run", "predict", "run a model over data"),
    "export": Verb("trainyard.cli.export", "export", "write a checkpoint's model as ONNX, torch.export, ..."),
    "checkpoints": Verb(
        "trainyard.cli.checkpoints", "checkpoints", "list, verify, show, export, prune what a run has saved"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script, and `python -m trainyard`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h"):
        from trainyard.cli.help import verbs_help

        print(verbs_help(PROG, {name: verb.words for name, verb in VERBS.items()}))
        return 0 if words else 2
    verb = VERBS.get(words[0])
    if verb is None:
        from trainyard.utilities.hints import nearest

        print(f"{PROG}: error: there is no {words[0]!r}{nearest(words[0], VERBS)}", file=sys.stderr)
        return 2
    # A console script has its own folder there, and the user's modules lie in the working directory.
    here = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        code = getattr(import_module(verb.module), verb.function)(words[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `trainyard fit --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(code or 0)
