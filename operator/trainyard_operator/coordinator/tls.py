"""The coordinator's TLS: a server context that follows its files (cert-manager and kubelets replace them)."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

CHECK_SECONDS = 10.0
"""How often the files are looked at. A mounted Secret is up to a minute late anyway."""


class ServerTls:
    """`context` serves the pair in the files; new handshakes use the new pair after `reload()`.

    Raises OSError or ssl.SSLError when the files cannot be used at the start. TLS 1.2 is the least version
    (RFC 9325); the ciphers are Python's defaults.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert = cert
        self._key = key
        self._stamp = self._look()
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def reload(self) -> bool:
        """Loads the files if they changed; True if so. A pair that does not fit is logged and not taken."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return False
            # A failed load leaves a context with the new certificate and the old key: try it elsewhere first.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except (OSError, ssl.SSLError) as error:
            log.error("cannot reload %s, serving the old certificate: %s", self._cert, error)
            return False
        self._stamp = stamp
        log.info("reloaded %s", self._cert)
        return True

    async def follow(self) -> None:
        """Reloads for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            self.reload()

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._cert, self._key, password=_no_password)
        return context

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        stats = [path.stat() for path in (self._cert, self._key)]
        return tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)


def _no_password() -> str:
    """Without it OpenSSL would ask on the terminal, and hang."""
    raise ssl.SSLError("the private key is encrypted; the operator has no pass phrase")
