"""Where a hyperparameter lives: in the module, in the data module, in the hyperparameters of either."""

from __future__ import annotations

from typing import Any

from trainyard.errors import MisconfigurationException


def find(owners: list[Any], name: str) -> list[Any]:
    """Those of `owners` and of their `hparams` that have it."""
    found = []
    for owner in owners:
        if owner is None:
            continue
        if hasattr(owner, name):
            found.append(owner)
        hparams = getattr(owner, "hparams", None)
        if hparams is not None and (name in hparams if isinstance(hparams, dict) else hasattr(hparams, name)):
            found.append(hparams)
    return found


def read(owners: list[Any], name: str) -> Any:
    """Of the first that has it. Raises MisconfigurationException if there is none."""
    holders = find(owners, name)
    if not holders:
        raise _missing(owners, [name])
    holder = holders[0]
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def write(owners: list[Any], name: str, value: Any) -> None:
    """In all that have it. Raises MisconfigurationException if there is none."""
    holders = find(owners, name)
    if not holders:
        raise _missing(owners, [name])
    for holder in holders:
        if isinstance(holder, dict):
            holder[name] = value
        else:
            setattr(holder, name, value)


def pick(owners: list[Any], names: list[str]) -> str:
    """The first of `names` that somebody has. Raises MisconfigurationException."""
    for name in names:
        if find(owners, name):
            return name
    raise _missing(owners, names)


def _missing(owners: list[Any], names: list[str]) -> MisconfigurationException:
    where = " and ".join(type(owner).__name__ for owner in owners if owner is not None)
    return MisconfigurationException(
        f"{where}: there is no {' or '.join(names)}, neither as an attribute nor in hparams, to put the result into"
    )
