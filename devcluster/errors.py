"""The one exception of this package that is meant to be read by a person."""

from __future__ import annotations


class DevclusterError(RuntimeError):
    """Says what could not be done, why, and what to try; the command line prints it without a traceback."""
