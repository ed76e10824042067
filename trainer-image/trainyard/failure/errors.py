"""How a run ends before its time."""

from __future__ import annotations

SIGTERM_CODE = 143
"""128 + SIGTERM, as a shell would say it."""


class SIGTERMException(SystemExit):
    """The run was asked to stop, and has saved what it is to go on from. Ends the process with code 143."""

    def __init__(self, message: str = "stopped by SIGTERM") -> None:
        super().__init__(message)
        self.code = SIGTERM_CODE


class PeerFailed(RuntimeError):
    """Another rank failed; this one ends because of it. The message has that rank's error."""


class StopFailed(RuntimeError):
    """The ranks could not agree on where to stop."""
