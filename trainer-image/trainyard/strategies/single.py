"""One process, one device."""

from __future__ import annotations

from trainyard.strategies.base import Strategy


class SingleDeviceStrategy(Strategy):
    """What the base class does."""

    name = "single_device"
    takes_virtual_ranks = True
