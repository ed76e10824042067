"""TorchServe, with which the archive of examples/serving is tested: a Java program and its Python environment."""

from __future__ import annotations

import shutil
from pathlib import Path

from devcluster import debian, venvs


def ensure() -> Path:
    """The environment with torchserve and torch-model-archiver in `bin`, and a Java on PATH.

    Raises DevclusterError where Java is missing and cannot be installed.
    """
    if shutil.which("java") is None:
        debian.ensure(["default-jre-headless"], "TorchServe's front end is a Java program")
    return venvs.environment("torchserve")
