"""Addresses without names: nothing here asks a resolver."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """Name of the network interface that has `address`; None if there is none or it is no IP address."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        return None
    if wanted.version == 6:
        with suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                packed, *_, name = line.split()
                if int(packed, 16) == int(wanted):
                    return name
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if answer[20:24] == wanted.packed:
                    return name
    return None


def wait_for_listener(address: str, port: int, bound: float) -> None:
    """Until something listens at `address`:`port`. Raises TimeoutError after `bound` seconds.

    The TCPStore's own retry backs off by about a second after the first refused connection
    (TCPStore.cpp, ExponentialBackoffWithJitter), which would be most of an in-place restart.
    """
    deadline = time.monotonic() + bound
    pause = 0.005
    while True:
        try:
            with socket.create_connection((address, port), timeout=1.0):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"node 0 did not open its rendezvous store at {address}:{port} within {bound:.0f} s: {error}"
                ) from None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
