"""Label selectors as the API server reads them (k8s.io/apimachinery/pkg/labels/selector.go)."""

from __future__ import annotations

import re
from typing import Any

_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^)]*)\)$")


def matches(selector: str, obj: dict[str, Any]) -> bool:
    """Whether the object's labels satisfy `selector`. Raises ValueError for what it cannot read."""
    labels: dict[str, str] = obj.get("metadata", {}).get("labels") or {}
    terms = re.split(r",(?![^(]*\))", selector) if selector else []
    return all(_term(term.strip(), labels) for term in terms)


def _term(term: str, labels: dict[str, str]) -> bool:
    if found := _SET.match(term):
        key, operator, values = found.groups()
        inside = labels.get(key) in {v.strip() for v in values.split(",")}
        return inside if operator == "in" else not inside
    if "!=" in term:
        key, value = term.split("!=", 1)
        return labels.get(key.strip()) != value.strip()
    if "=" in term:
        key, value = term.replace("==", "=").split("=", 1)
        return labels.get(key.strip()) == value.strip()
    if term.startswith("!"):
        return term[1:] not in labels
    if not re.fullmatch(r"[\w./-]+", term):
        raise ValueError(f"cannot read the label selector term {term!r}")
    return term in labels


def has_fields(selector: str, obj: Any) -> bool:
    """Whether the object has all of `path=value,...`."""
    for term in filter(None, selector.split(",")):
        path, _, wanted = term.partition("=")
        value = obj
        for part in path.split("."):
            value = value.get(part, {}) if isinstance(value, dict) else {}
        if value != wanted:
            return False
    return True
