"""Errors, under the import path that ported code uses."""

from trainyard.errors import MisconfigurationException
from trainyard.failure.errors import SIGTERMException

__all__ = ["MisconfigurationException", "SIGTERMException"]
