"""Why a container is still not made: the kubelet tells it in Events only (a volume that cannot be mounted)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from trainyard_operator.clock import Clock
from trainyard_operator.kube.api import CORE_EVENTS, Api, ApiError, Object
from trainyard_operator.observe import pod_view
from trainyard_operator.plan.deadlines import SETUP_SECONDS, being_created

IGNORED = ("FailedScheduling",)
"""Told by the pod's own status, and over once it has a node."""
MOST_PODS = 2
"""Pods that are asked about in one round: what one of a gang lacks, the others lack as well."""

log = logging.getLogger(__name__)


class PodEvents:
    """Asks only about pods whose creation takes long, so that a healthy cluster costs no request."""

    def __init__(self, api: Api, clock: Clock) -> None:
        self._api = api
        self._clock = clock

    async def look(self, pods: Iterable[Object], known: Mapping[str, str]) -> dict[str, str]:
        """Newest complaint by pod UID, of those pods that are still being created. Never raises ApiError."""
        # Every round comes here, and nearly all pods run: those are passed over before anything of them is parsed.
        unmade = [pod for pod in pods if not _is_made(pod)]
        slow = [p for p in unmade if being_created(view := pod_view(p)) and self._is_slow(view.creation_time)]
        found = {uid: known[uid] for pod in slow if (uid := pod["metadata"]["uid"]) in known}
        for pod in slow[:MOST_PODS]:
            meta = pod["metadata"]
            try:
                events = await self._api.list(
                    CORE_EVENTS,
                    meta["namespace"],
                    field_selector=f"involvedObject.uid={meta['uid']},type=Warning",
                )
            except ApiError as error:
                log.warning("cannot read the Events of pod %s/%s: %s", meta["namespace"], meta["name"], error)
                continue
            if complaint := newest(events["items"]):
                found[meta["uid"]] = complaint
        return found

    def _is_slow(self, created: float) -> bool:
        return self._clock.time() >= created + SETUP_SECONDS


def _is_made(pod: Object) -> bool:
    status = pod.get("status")
    return isinstance(status, dict) and status.get("phase") in ("Running", "Succeeded", "Failed")


def newest(events: Iterable[Object]) -> str:
    """ "Reason: message" of the last of these core/v1 Events; empty if there is none."""
    told = [e for e in events if e.get("reason") not in IGNORED and e.get("message")]
    if not told:
        return ""
    last = max(told, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
    return f"{last.get('reason', '')}: {last['message']}"
