"""The same name for the same logger in every attempt of a TrainingRun."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping

from trainyard_api.contract import Env

_made: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
"""How many loggers of a kind the script has constructed: it does so in the same order in every attempt."""


def run_key(kind: str, *parts: object, env: Mapping[str, str] = os.environ) -> str | None:
    """64 hexadecimal digits; None outside of a TrainingRun. To be called once in a logger's constructor.

    An attempt may be killed before its first checkpoint, so the run must be found again without one.
    """
    uid = env.get(Env.RUN_UID)
    if not uid:
        return None
    label = "\0".join([kind, *map(str, parts)])
    number = next(_made[f"{uid}\0{label}"])
    return hashlib.sha256(f"{uid}\0{label}\0{number}".encode()).hexdigest()
