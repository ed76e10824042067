"""Which ports are free."""

from __future__ import annotations

import socket

from devcluster.errors import DevclusterError


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports nobody listens on; all are held until the last is found, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((address, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def is_free(port: int, address: str) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        # Connections of a server that has just ended may linger; they do not keep a new one from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def check_free(port: int, address: str, owner: str) -> None:
    """Say it plainly when a fixed port is taken."""
    if not is_free(port, address):
        raise DevclusterError(
            f"{owner} cannot listen on {address}:{port}: another program does (ss -ltnp shows which)"
        )
