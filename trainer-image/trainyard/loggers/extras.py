"""Optional packages: looked for when a logger is made, imported when it is first used."""

from __future__ import annotations

from trainyard.utilities.optional import has


def require(package: str, extra: str, user: str) -> None:
    """Raises ModuleNotFoundError that says what to install."""
    if not has(package):
        raise ModuleNotFoundError(
            f"{user} needs the package {package}: pip install 'trainyard[{extra}]'", name=package
        )
