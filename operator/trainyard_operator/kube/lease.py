"""Leader election on a coordination.k8s.io Lease: at most one operator acts.

The algorithm of client-go (tools/leaderelection/leaderelection.go): compare-and-swap by resourceVersion,
and a candidate's own monotonic clock measures for how long *it* has seen no change of the record. Clocks of
different machines are never compared; the times in the record are for people.

A leader whose renewal does not succeed for `renew_deadline` calls `on_lost`, which has to end the process:
the others take over `lease_duration` after the last renewal that they saw, and by then nothing of ours may
run.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainyard_operator.clock import Clock, SystemClock
from trainyard_operator.kube.api import LEASES, Api, ApiError, Object
from trainyard_operator.kube.times import micro_time

RELEASE_SECONDS = 3.0
"""How long giving the lease back may take at the end; without it the others wait for its end."""
JITTER = 0.2
MIN_RETRY = 0.25
"""Seconds between two tries of a leader that is about to lose its lease."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; the defaults are those of Kubernetes' own controllers."""

    lease_duration: float = 15.0
    renew_deadline: float = 10.0
    retry_period: float = 2.0

    def __post_init__(self) -> None:
        if not self.lease_duration > self.renew_deadline > self.retry_period * (1 + JITTER) > 0:
            raise ValueError("lease duration > renew deadline > 1.2 * retry period > 0 must hold")


class LeaderElector:
    """One candidate. `identity` must be of this process alone (host name and a random part)."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        on_lost: Callable[[str], None],
        *,
        timing: Timing | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        if not identity:
            raise ValueError("a candidate needs an identity")
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._on_lost = on_lost
        self._timing = timing or Timing()
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._lease: Object | None = None
        """The record as last seen or written."""
        self._seen_spec: dict[str, Any] | None = None
        self._seen_at = 0.0
        """When by our clock the record was seen to change."""
        self._renewed_at = 0.0
        """When by our clock the newest successful renewal was *sent*."""
        self.leading = asyncio.Event()
        """Set while this process is the leader."""

    @property
    def holder(self) -> str:
        """Identity of the leader as far as we know; empty if there is none."""
        return str(_spec(self._lease).get("holderIdentity") or "")

    def is_leading(self) -> bool:
        """Whether we lead at this moment, by the clock: false as soon as a renewal is overdue.

        To be asked before a write: a process that was stopped for a while learns it here first.
        """
        age = self._clock.monotonic() - self._renewed_at
        return self.leading.is_set() and age < self._timing.renew_deadline

    async def run(self) -> None:
        """Stands for election, then renews. Returns after `on_lost`; cancelling it gives the lease back."""
        try:
            await self._acquire()
            log.info("%s leads (lease %s/%s)", self._identity, self._namespace, self._name)
            self.leading.set()
            why = await self._renew()
        except asyncio.CancelledError:
            await self._release()
            raise
        self.leading.clear()
        log.error("%s lost the lease %s/%s: %s", self._identity, self._namespace, self._name, why)
        self._on_lost(why)

    # ---- the two loops ------------------------------------------------------------------------------

    async def _acquire(self) -> None:
        """Waits as long as another leads: that is what a standby is for."""
        told = ""
        while True:
            try:
                # Half of it, so that who leads after a slow answer has time to renew.
                async with asyncio.timeout(self._timing.renew_deadline / 2):
                    if await self._try():
                        return
            except (ApiError, TimeoutError) as error:
                self._lease = None
                log.warning("cannot stand for election yet: %s", str(error) or "no answer in time")
            else:
                if self.holder != told:
                    told = self.holder
                    log.info("waiting: %s leads", told or "nobody")
            await self._clock.sleep(self._timing.retry_period * self._rng.uniform(1, 1 + JITTER))

    async def _renew(self) -> str:
        """Returns why we no longer lead."""
        trouble = "no time was left"
        while True:
            left = self._renewed_at + self._timing.renew_deadline - self._clock.monotonic()
            # Sooner and sooner towards the end, so that an outage of any shorter length is survived.
            await self._clock.sleep(min(self._timing.retry_period, max(left / 2, MIN_RETRY)))
            left = self._renewed_at + self._timing.renew_deadline - self._clock.monotonic()
            if left <= 0:
                return f"not renewed for {self._timing.renew_deadline:g} s: {trouble}"
            try:
                async with asyncio.timeout(left):
                    if not await self._try():
                        return f"{self.holder or 'nobody'} holds it now"
            except (ApiError, TimeoutError) as error:
                self._lease = None  # its version may be old: read it next time
                trouble = str(error) or "no answer in time"
                log.warning("the lease could not be renewed: %s", trouble)

    # ---- one step -----------------------------------------------------------------------------------

    async def _try(self) -> bool:
        """Writes the record as ours if we may. False if another has it."""
        sent = self._clock.monotonic()
        if self._lease is None or not self.leading.is_set():
            try:
                self._observe(await self._api.get(LEASES, self._namespace, self._name))
            except ApiError as error:
                if error.status != 404:
                    raise
                return await self._create(sent)
        if self.holder not in ("", self._identity) and not self._expired():
            return False
        if self.leading.is_set() and self.holder != self._identity:
            return False  # somebody took it or emptied it: what was ours is over, even if it is free again
        wanted = {**(self._lease or {}), "spec": self._record()}
        try:
            self._observe(await self._api.replace(LEASES, self._namespace, self._name, wanted))
        except ApiError as error:
            if error.status == 409 and not self.leading.is_set():
                return False  # another candidate was quicker
            raise
        self._renewed_at = sent
        return True

    async def _create(self, sent: float) -> bool:
        if self.leading.is_set():
            return False  # deleted under us: whoever creates it first leads, and we cannot tell who did
        body = {
            "apiVersion": LEASES.group + "/" + LEASES.version,
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._record(),
        }
        try:
            self._observe(await self._api.create(LEASES, self._namespace, body))
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        self._renewed_at = sent
        return True

    def _record(self) -> dict[str, Any]:
        now = micro_time(self._clock.time())
        old = _spec(self._lease)
        ours = old.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._timing.lease_duration)),
            "acquireTime": old.get("acquireTime", now) if ours else now,
            "renewTime": now,
            "leaseTransitions": int(old.get("leaseTransitions") or 0) + (0 if ours or not old else 1),
        }

    def _observe(self, lease: Object) -> None:
        self._lease = lease
        if lease.get("spec") != self._seen_spec:
            self._seen_spec = lease.get("spec")
            self._seen_at = self._clock.monotonic()

    def _expired(self) -> bool:
        """Whether the record did not change for as long as its holder promised to need, as seen by us."""
        promised = float(_spec(self._lease).get("leaseDurationSeconds") or self._timing.lease_duration)
        return self._clock.monotonic() - self._seen_at >= promised

    async def _release(self) -> None:
        """Lets the next one in at once. Failing that costs only time."""
        if not self.leading.is_set():
            return
        self.leading.clear()
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                if self._lease is None:
                    self._lease = await self._api.get(LEASES, self._namespace, self._name)
                if self.holder != self._identity:
                    return
                # As client-go does: the duration must be positive, so the shortest one.
                spec = {**self._record(), "holderIdentity": "", "leaseDurationSeconds": 1}
                await self._api.replace(LEASES, self._namespace, self._name, {**self._lease, "spec": spec})
                log.info("%s gave the lease back", self._identity)
        except (ApiError, TimeoutError) as error:
            log.warning("the lease could not be given back: %s", str(error) or "no answer in time")


def _spec(lease: Object | None) -> dict[str, Any]:
    return (lease or {}).get("spec") or {}
