"""JSON merge patch, as the API server applies it."""

from __future__ import annotations

import copy

from trainyard_operator.kube.api import Object


def merge(target: object, patch: object) -> Object:
    """JSON merge patch, RFC 7396; the result shares nothing with its arguments."""
    result = copy.deepcopy(target) if isinstance(target, dict) else {}
    assert isinstance(patch, dict)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merge(result.get(key), value)
        else:
            result[key] = copy.deepcopy(value)
    return result
