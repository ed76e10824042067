"""Which Debian mirror this machine uses: the machine is asked, so that no file here names a host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from devcluster.errors import DevclusterError

VARIABLE = "TRAINYARD_DEBIAN_MIRROR"
_FORMAT = "$(CREATED_BY)|$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(RELEASE)|$(REPO_URI)"


def find() -> str:
    """The mirror's URL. Raises DevclusterError where apt has none, which says how to name one."""
    if chosen := os.environ.get(VARIABLE):
        return chosen
    if mirror := choose(_apt("apt-get", "indextargets", "--format", _FORMAT).splitlines()):
        return mirror
    raise DevclusterError(f"apt has no Debian mirror in its sources: set {VARIABLE} to the URL of one")


def choose(targets: Iterable[str]) -> str | None:
    """The first archive of Debian itself among apt's index targets: no security updates, no third party's."""
    for line in targets:
        kind, origin, label, component, release, uri = line.split("|", 5)
        if (kind, origin, label, component) == (
            "Packages",
            "Debian",
            "Debian",
            "main",
        ) and "-" not in release:
            return uri.rstrip("/")
    return None


def environment() -> dict[str, str]:
    """The environment for debootstrap, which downloads with wget and knows nothing of apt's proxy."""
    found = {}
    for scheme in ("http", "https"):
        proxy = (
            _apt("apt-config", "shell", "P", f"Acquire::{scheme}::Proxy").partition("'")[2].rpartition("'")[0]
        )
        if proxy and proxy.upper() != "DIRECT":
            found[f"{scheme}_proxy"] = proxy
    return os.environ | found


def _apt(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except FileNotFoundError:
        return ""
