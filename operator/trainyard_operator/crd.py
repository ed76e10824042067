"""Is our CustomResourceDefinition there? Asked once, at the start, to say so plainly if it is not."""

from __future__ import annotations

import logging

from trainyard_api.contract import GROUP, PLURAL, VERSION
from trainyard_operator.clock import Clock
from trainyard_operator.kube.api import CRDS, Api, ApiError

log = logging.getLogger(__name__)

API_SECONDS = 600.0
"""How long to wait for an API server that does not answer."""
POLL_SECONDS = 1.0


class NoCrdError(Exception):
    """Our CRD is not in the cluster, or not in the version that we speak."""


async def check_crd(api: Api, clock: Clock) -> None:
    """Waits for the API server, and raises NoCrdError when the CRD is not usable there.

    An API server that does not answer for API_SECONDS raises its ApiError.
    """
    name, deadline = f"{PLURAL}.{GROUP}", clock.monotonic() + API_SECONDS
    while True:
        try:
            crd = await api.get(CRDS, None, name)
        except ApiError as error:
            if error.status == 404:
                raise NoCrdError(
                    f"the CustomResourceDefinition {name} is not in this cluster: "
                    "kubectl apply --server-side -f crds/trainyard.dev_trainingruns.yaml"
                ) from None
            if error.status not in (0, 429) and error.status < 500:
                raise
            if clock.monotonic() > deadline:
                raise
            log.warning("waiting for the API server: %s", error)
            await clock.sleep(POLL_SECONDS)
            continue
        break
    served = [v["name"] for v in crd["spec"]["versions"] if v.get("served")]
    if VERSION not in served:
        raise NoCrdError(f"{name} serves {', '.join(served)}, this operator needs {VERSION}: apply its CRD")
