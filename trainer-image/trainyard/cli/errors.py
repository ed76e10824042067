"""What is wrong with a command line or a configuration: one line, said without a traceback."""

from __future__ import annotations

from trainyard.errors import MisconfigurationException


class CliError(MisconfigurationException):
    """The text names the argument, and what to do."""
