"""TorchServe, with which the archive of examples/serving is tested: a Java program and its Python environment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from devcluster import debian, venvs


def obstacle() -> str | None:
    """Why there can be no TorchServe on this machine; None if there can."""
    if shutil.which("java") is None and (os.geteuid() != 0 or shutil.which("dpkg-query") is None):
        return "TorchServe's front end needs java, which is not on PATH and cannot be installed without root"
    return None


def ensure() -> Path:
    """The environment with torchserve and torch-model-archiver in `bin`, and a Java on PATH.

    Raises DevclusterError where there is an `obstacle`, and if installing fails.
    """
    if shutil.which("java") is None:
        debian.ensure(["default-jre-headless"], "TorchServe's front end is a Java program")
    return venvs.environment("torchserve")
