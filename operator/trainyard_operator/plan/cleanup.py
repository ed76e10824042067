"""Deleting a run together with its checkpoints (`checkpoint.deletionPolicy: Delete`), which never hangs.

A finalizer of ours holds the run from before its first pod until `status.cleanup.result` is written. In between:
the pods of the run end; then, one at a time, at most MAX_TRIES cleanup pods run (plan/cleanup_pod.py). Every wait
has a bound that counts from a time in the status, so that a restarted operator goes on where the last one was and
one that was away for long does not give up before it has tried. What cannot be deleted stays behind, and a Warning
says where. Each step is written down before it is taken, as everywhere.
"""

from __future__ import annotations

from dataclasses import replace

from trainyard_api.contract import FINALIZER, ExitCode, Reason
from trainyard_api.v1alpha1 import CleanupStatus
from trainyard_operator.plan.cleanup_pod import WORK_SECONDS, cleanup_name, cleanup_number, cleanup_pod
from trainyard_operator.plan.deadlines import SETUP_SECONDS, Soonest, being_created
from trainyard_operator.plan.membership import outcome
from trainyard_operator.plan.model import CreatePod, DeletePod, EventNote, Plan, PodView, Refusal
from trainyard_operator.plan.texts import clean, listed
from trainyard_operator.plan.times import micro, parse
from trainyard_operator.plan.view import View
from trainyard_operator.plan.waiting import CONFIG_REASONS, IMAGE_REASONS

MAX_TRIES = 3
END_SECONDS = 300.0
"""How long the pods of the run may take to end, beside their grace period: a node that was cut off gets its
pods' deletion by then, or not at all."""
START_SECONDS = 300.0
"""How long a cleanup pod may take to be created and to start."""
TROUBLE_SECONDS = 60.0
"""The same when its image or a volume is not to be had: waiting seldom helps."""
RETRY_SECONDS = 10.0
"""Pause before the second try, twice before the third."""
GC_FINALIZERS = ("foregroundDeletion", "orphan")
"""While one of them is on the run, the garbage collector deletes or disowns every pod of it, a cleanup pod too."""
DELETED, LEFT_BEHIND = "Deleted", "LeftBehind"


def guarded(view: View) -> Plan | None:
    """The finalizer comes before anything that could write a checkpoint."""
    run = view.run
    if not run.spec.checkpoint.deletes or FINALIZER in run.finalizers:
        return None
    return Plan(finalizers=(*run.finalizers, FINALIZER), requeue_after=0.0)


def being_deleted(view: View) -> Plan | None:
    """Agents exit. Without our finalizer the garbage collector does the rest, by the pods' ownerReferences."""
    run, cleanup = view.run, view.status.cleanup
    if not run.deleting:
        return None
    if FINALIZER not in run.finalizers:
        return Plan(directives={})
    nothing_written = view.attempt < 1 or not run.spec.checkpoint.deletes
    if nothing_written or (cleanup is not None and cleanup.result):
        return Plan(finalizers=tuple(f for f in run.finalizers if f != FINALIZER), directives={})
    if cleanup is None:
        return _written(view, CleanupStatus(start_time=micro(view.now)))
    waiting = _pods_end(view, cleanup)
    if waiting is not None:
        return waiting
    if cleanup.tries < 1:
        note = EventNote(
            reason=str(Reason.DELETING_CHECKPOINTS),
            message=clean(f"All pods have ended; deleting the checkpoints {_where(view)}"),
            action="Delete",
        )
        return _written(view, replace(cleanup, tries=1, try_time=micro(view.now)), note)
    return _trying(view, cleanup)


def _pods_end(view: View, cleanup: CleanupStatus) -> Plan | None:
    """While a pod of the run may still write, and while the garbage collector is at work; None after that."""
    others = [p for p in view.observed.pods if cleanup_number(view.run.name, p.name) is None]
    alive = [p for p in others if p.phase not in ("Succeeded", "Failed")]
    collected = [f for f in view.run.finalizers if f in GC_FINALIZERS]
    if not alive and not collected:
        return None
    soonest = Soonest(view.now)
    limit = view.spec.termination_grace_period_seconds + END_SECONDS
    if soonest.passed((parse(cleanup.start_time) or 0.0) + limit):
        pods = f"pods that have not ended: {listed([p.name for p in alive])}" if alive else ""
        return _left_behind(view, cleanup, pods or f"the garbage collector holds the run ({collected[0]})")
    deletes = tuple(
        DeletePod(name=p.name, uid=p.uid, why="the run is being deleted") for p in others if not p.deleting
    )
    return Plan(delete_pods=deletes, directives={}, requeue_after=soonest.seconds)


def _trying(view: View, cleanup: CleanupStatus) -> Plan:
    """One try: its pod is asked for, waited for, and judged."""
    name = cleanup_name(view.run.name, cleanup.tries)
    pod = next((p for p in view.observed.pods if p.name == name), None)
    refusal = next((r for r in view.observed.refusals if r.pod == name), None)
    if pod is not None and pod.phase in ("Succeeded", "Failed"):
        return _ended(view, cleanup, pod)
    if pod is None and refusal is not None and refusal.hopeless:
        return _left_behind(view, cleanup, "the namespace is being deleted, and no pod can be created in it")
    soonest = Soonest(view.now)
    begin = parse(cleanup.try_time) or 0.0
    if soonest.passed(begin + _patience(pod)):
        return _too_late(view, cleanup, pod, refusal)
    if pod is not None and being_created(pod):
        due = pod.creation_time + SETUP_SECONDS
        soonest.passed(due if due > view.now else view.now + SETUP_SECONDS)
    wanted = pod is None and soonest.passed(begin) and (refusal is None or soonest.passed(refusal.retry_at))
    body = cleanup_pod(view.run, cleanup.tries)
    creates = (CreatePod(name=name, body=body),) if wanted else ()
    return Plan(create_pods=creates, directives={}, requeue_after=soonest.seconds)


def _patience(pod: PodView | None) -> float:
    """Seconds that a try may take, by how its pod is."""
    if pod is None:
        return START_SECONDS
    if pod.phase == "Pending":
        trouble = pod.setup_trouble or pod.waiting_reason in (*IMAGE_REASONS, *CONFIG_REASONS)
        return TROUBLE_SECONDS if trouble else START_SECONDS
    return START_SECONDS + WORK_SECONDS + TROUBLE_SECONDS  # its kubelet should have ended it: it was cut off


def _ended(view: View, cleanup: CleanupStatus, pod: PodView) -> Plan:
    """What a cleanup pod came to."""
    said = outcome(pod)
    words = clean(said.get("message") or pod.termination_message or pod.message or pod.reason, 600)
    if pod.phase == "Succeeded" and said.get("outcome") == "deleted":
        status = replace(cleanup, result=DELETED, message=words)
        note = EventNote(
            reason=str(Reason.CHECKPOINTS_DELETED),
            message=clean(f"The checkpoints {_where(view)} are deleted: {words}"),
            action="Delete",
        )
        return _written(view, status, note)
    code = "" if pod.exit_code is None else f" with exit code {pod.exit_code}"
    why = f"pod {pod.name} ended{code}: {words or 'it said nothing'}"
    if pod.exit_code == ExitCode.CONFIG:
        return _left_behind(view, cleanup, why)
    return _try_again(view, cleanup, why)


def _too_late(view: View, cleanup: CleanupStatus, pod: PodView | None, refusal: Refusal | None) -> Plan:
    """The time of a try is over."""
    if pod is None and refusal is not None:
        return _left_behind(
            view, cleanup, f"pod {refusal.pod} cannot be created: {clean(refusal.message, 600)}"
        )
    if pod is None:
        return _try_again(view, cleanup, f"pod {cleanup_name(view.run.name, cleanup.tries)} was lost")
    if pod.phase == "Pending":
        told = pod.setup_trouble or pod.unschedulable or f"{pod.waiting_reason} {pod.waiting_message}".strip()
        return _left_behind(
            view, cleanup, f"pod {pod.name} does not start: {clean(told or 'no reason is known', 600)}"
        )
    return _try_again(view, cleanup, f"pod {pod.name} did not end on node {pod.node or '(none)'}", pod)


def _try_again(view: View, cleanup: CleanupStatus, why: str, doomed: PodView | None = None) -> Plan:
    if cleanup.tries >= MAX_TRIES:
        return _left_behind(view, cleanup, f"{why} (try {cleanup.tries} of {MAX_TRIES})")
    pause = RETRY_SECONDS * cleanup.tries
    status = replace(cleanup, tries=cleanup.tries + 1, try_time=micro(view.now + pause), message=clean(why))
    note = EventNote(
        reason=str(Reason.DELETING_CHECKPOINTS),
        message=clean(f"Try {cleanup.tries} of {MAX_TRIES} to delete the checkpoints failed: {why}"),
        warning=True,
        action="Delete",
    )
    decided = _written(view, status, note)
    if doomed is None or doomed.deleting:
        return decided
    return replace(
        decided, delete_pods=(DeletePod(name=doomed.name, uid=doomed.uid, why="its time is over"),)
    )


def _left_behind(view: View, cleanup: CleanupStatus, why: str) -> Plan:
    """Given up: the run goes, its checkpoints do not."""
    message = clean(f"The checkpoints {_where(view)} stay behind, delete them by hand: {why}")
    note = EventNote(
        reason=str(Reason.CHECKPOINTS_LEFT_BEHIND), message=message, warning=True, action="Delete"
    )
    return _written(view, replace(cleanup, result=LEFT_BEHIND, message=message), note)


def _written(view: View, cleanup: CleanupStatus, *notes: EventNote) -> Plan:
    """The step is written down; the next round, at once, takes it."""
    status = replace(view.status, cleanup=cleanup)
    return Plan(status=status, directives={}, events=notes, requeue_after=0.0)


def _where(view: View) -> str:
    return f"under {view.spec.checkpoint.uri}/{view.run.uid}/"
