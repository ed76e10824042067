"""The one place that builds conditions."""

from __future__ import annotations

from collections.abc import Sequence

from trainyard_api.contract import ConditionType, Reason
from trainyard_api.v1alpha1 import Condition
from trainyard_operator.plan.texts import clean
from trainyard_operator.plan.times import rfc3339

ORDER = tuple(
    str(t)
    for t in (ConditionType.RUNNING, ConditionType.SUSPENDED, ConditionType.COMPLETE, ConditionType.FAILED)
)


def with_condition(
    conditions: Sequence[Condition],
    kind: ConditionType,
    status: bool,
    reason: Reason,
    message: str,
    *,
    now: float,
    generation: int,
) -> list[Condition]:
    """The conditions with one set; `lastTransitionTime` moves only when its status does (metav1.Condition)."""
    value = "True" if status else "False"
    before = next((c for c in conditions if c.type == str(kind)), None)
    kept = before is not None and before.status == value and before.last_transition_time
    new = Condition(
        type=str(kind),
        status=value,
        reason=str(reason),
        message=clean(message),
        last_transition_time=before.last_transition_time if before and kept else rfc3339(now),
        observed_generation=generation,
    )
    others = [c for c in conditions if c.type != str(kind)]
    return sorted(
        [*others, new], key=lambda c: (ORDER.index(c.type) if c.type in ORDER else len(ORDER), c.type)
    )
