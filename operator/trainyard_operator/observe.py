"""From the API's objects to what `plan()` reads. Pure over its inputs; raw dicts end here.

Only the run itself can be bad (ValueError). A pod is never: whatever is missing or odd in it is read as
absent, because a pod that cannot be read must still be seen, or it would be created again and again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from trainyard_api import contract
from trainyard_api.v1alpha1 import TrainingRun
from trainyard_operator.plan.deadlines import being_created
from trainyard_operator.plan.model import Member, Observed, PodView, Refusal
from trainyard_operator.plan.names import parse_pod_name
from trainyard_operator.plan.times import parse

Object = dict[str, Any]


def observe(
    run: Object,
    pods: Iterable[Object],
    members: Mapping[str, Member],
    *,
    now: float,
    listening_since: float = 0.0,
    refusals: Iterable[Refusal] = (),
    status_written: float = 0.0,
    setup_troubles: Mapping[str, str] | None = None,
) -> Observed:
    """One run at `now` (Unix seconds). Pods that it does not control are left out, whatever their labels say.

    Raises ValueError for a run that the CRD's schema should have refused.
    """
    try:
        parsed = TrainingRun.from_object(run)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a TrainingRun: {error!r}") from None
    if parsed.spec.nodes.desired < 1:
        raise ValueError("spec.nodes: must be at least 1")
    return Observed(
        run=parsed,
        pods=tuple(
            _with_trouble(pod_view(pod), setup_troubles or {})
            for pod in pods
            if controlled_by(pod, parsed.uid)
        ),
        members=members,
        now=now,
        listening_since=listening_since,
        refusals=tuple(refusals),
        status_written=status_written,
    )


def _with_trouble(pod: PodView, troubles: Mapping[str, str]) -> PodView:
    """What the kubelet complained of counts only while the container is still not made."""
    trouble = troubles.get(pod.uid, "")
    return replace(pod, setup_trouble=trouble) if trouble and being_created(pod) else pod


def controlled_by(pod: Object, uid: str) -> bool:
    """Whether the controlling ownerReference names this UID."""
    references = _list(_dict(pod.get("metadata")).get("ownerReferences"))
    return any(r.get("controller") is True and r.get("uid") == uid for r in references)


def pod_view(pod: Object) -> PodView:
    """One pod, from whatever it holds."""
    meta, status = _dict(pod.get("metadata")), _dict(pod.get("status"))
    name = _text(meta.get("name"))
    index, created_in = _place(name, _dict(meta.get("labels")))
    conditions = {_text(c.get("type")): c for c in _list(status.get("conditions"))}
    disrupted = conditions.get("DisruptionTarget", {})
    disrupted = disrupted if disrupted.get("status") == "True" else {}
    scheduled = conditions.get("PodScheduled", {})
    waits = scheduled.get("status") == "False"
    state = _container_state(status)
    waiting, ended = _dict(state.get("waiting")), _dict(state.get("terminated"))
    started = _dict(state.get("running")).get("startedAt") or ended.get("startedAt")
    code = ended.get("exitCode")
    return PodView(
        name=name,
        uid=_text(meta.get("uid")),
        index=index,
        created_in=created_in,
        phase=_text(status.get("phase")) or "Pending",
        ip=_text(status.get("podIP")),
        node=_text(_dict(pod.get("spec")).get("nodeName")),
        deleting="deletionTimestamp" in meta,
        creation_time=parse(_text(meta.get("creationTimestamp"))) or 0.0,
        started_at=parse(_text(started)) or 0.0,
        reason=_text(status.get("reason")) or _text(disrupted.get("reason")),
        message=_text(status.get("message")) or _text(disrupted.get("message")),
        unschedulable=(_text(scheduled.get("message")) or _text(scheduled.get("reason"))) if waits else "",
        waiting_reason=_text(waiting.get("reason")),
        waiting_message=_text(waiting.get("message")),
        exit_code=code if isinstance(code, int) else None,
        terminated_reason=_text(ended.get("reason")),
        termination_message=_text(ended.get("message")),
    )


def _place(name: str, labels: Object) -> tuple[int, int]:
    """(node index, attempt of creation): from the labels; from the name if somebody edited them away.

    (-1, 0), a place that no member has, when neither tells.
    """
    named = parse_pod_name(name) or (-1, 0)
    try:
        labelled = int(labels[contract.LABEL_NODE_INDEX]), int(labels[contract.LABEL_ATTEMPT])
    except (KeyError, ValueError, TypeError):
        return named
    return labelled if labelled == named else named


def _container_state(status: Object) -> Object:
    for container in _list(status.get("containerStatuses")):
        if container.get("name") in (contract.CONTAINER, contract.CLEANUP_CONTAINER):
            return _dict(container.get("state"))
    return {}


def _dict(value: Any) -> Object:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Object]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
