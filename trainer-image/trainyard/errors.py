"""Errors of the training library."""

from __future__ import annotations


class MisconfigurationException(Exception):
    """The arguments, or the module, ask for what cannot be. Lightning's name, so that ported code catches it."""
