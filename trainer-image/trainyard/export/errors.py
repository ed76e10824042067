"""What export says when it cannot."""

from __future__ import annotations

import linecache
import sys
import traceback
from typing import Any

from trainyard.errors import MisconfigurationException

_MOST = 400  # characters of another program's message that are worth repeating


class ExportError(MisconfigurationException, ValueError):
    """The module cannot be exported as asked. A ValueError too, which is what Lightning raises here."""


def untraceable(module: Any, how: str, error: BaseException, advice: str) -> ExportError:
    """`how` could not follow `module.forward`. The whole of torch's account is the exception's cause."""
    return ExportError(
        f"{how} cannot follow {type(module).__name__}.forward: {_gist(error)}\nWhat to do: {advice}"
    )


def failing(module: Any, error: BaseException) -> ExportError:
    """The module cannot do itself what it was to be exported for."""
    return ExportError(
        f"{type(module).__name__}.forward fails with the example: {_gist(error)}\nWhat to do: give an example as forward "
        "gets it, which is after the data module's on_after_batch_transfer"
    )


def missing(what: str, error: ImportError) -> ModuleNotFoundError:
    """An optional package is not installed."""
    return ModuleNotFoundError(f"{what} needs {error.name}: pip install 'trainyard[export]'", name=error.name)


def _gist(error: BaseException) -> str:
    """The innermost cause, and the line of the user's code that it is about: torch wraps both in pages of advice."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    lines = [line for line in str(chain[-1]).splitlines() if line.strip()]
    text = "\n".join(lines[:2])[:_MOST]
    where = next((found for each in reversed(chain) if (found := _users_line(each))), "")
    return f"{type(chain[-1]).__name__}: {text}{where}"


def _users_line(error: BaseException) -> str:
    """The innermost frame that is neither torch's nor ours nor Python's."""
    libraries = {"torch", "trainyard", *sys.stdlib_module_names} - {"__main__"}
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in libraries:
            file = frame.f_code.co_filename
            found = f"\n  at {file}:{line}: {linecache.getline(file, line).strip()}"
    return found
