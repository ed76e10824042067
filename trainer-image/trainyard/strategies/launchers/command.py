"""The command line that starts this program once more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainyard.errors import MisconfigurationException


def is_interactive() -> bool:
    """A notebook, or Python's prompt: there is no program that could be started once more."""
    main = sys.modules.get("__main__")
    return hasattr(sys, "ps1") or (not hasattr(main, "__file__") and sys.argv[:1] != ["-c"])


def own_command() -> list[str]:
    """Arguments as in `sys.argv` now. Raises MisconfigurationException in a notebook."""
    main = sys.modules["__main__"]
    python = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
    spec = getattr(main, "__spec__", None)
    if is_interactive():
        raise MisconfigurationException(
            "strategy: it starts the other processes by running the script again, but this is an interactive session; "
            "use strategy='ddp_notebook', which forks them"
        )
    if spec is not None:  # python -m
        name = spec.name.removesuffix(".__main__") if spec.name != "__main__" else sys.argv[0]
        return [*python, *(["-m", name] if spec.name != "__main__" else [name]), *sys.argv[1:]]
    if sys.argv[0] == "-c":
        return [sys.executable, *sys.orig_argv[1:]]
    return [*python, str(Path(main.__file__).absolute()), *sys.argv[1:]]  # type: ignore[arg-type]
