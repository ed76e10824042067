"""Deterministic names of children (design part 2)."""

from __future__ import annotations

import re

_SUFFIX = re.compile(r"-(\d{1,9})-(\d{1,9})$")
MAX_LABEL = 63
"""Characters of a label value (apimachinery, validation.LabelValueMaxLength)."""


def pod_name(run: str, index: int, attempt: int) -> str:
    """`<run>-<index>-<attempt in which it was created>`: a name is never used twice within a run."""
    return f"{run}-{index}-{attempt}"


def parse_pod_name(name: str) -> tuple[int, int] | None:
    """(index, attempt) of a pod's name, None if it was not made by `pod_name`."""
    found = _SUFFIX.search(name)
    return (int(found[1]), int(found[2])) if found else None


def label_value(text: str) -> str:
    """`text` as a label value: cut to 63 characters, ending in a letter or digit."""
    return re.sub(r"[^A-Za-z0-9]+$", "", text[:MAX_LABEL])
