"""Who is calling: TokenReview with an audience, cached.

The kubelet projects a service-account token, bound to the pod and for our audience only, into each training
pod. The API server tells us the pod's name and UID with the review (KEP-1205, KEP-2799). A token that was
accepted is asked about again after REVIEW_SECONDS, so that a deleted pod's token stops working then.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainyard_api.contract import TOKEN_AUDIENCE
from trainyard_operator.clock import Clock
from trainyard_operator.kube.api import TOKEN_REVIEWS, Api, ApiError, Object

log = logging.getLogger(__name__)

REVIEW_SECONDS = 300.0
REFUSED_SECONDS = 10.0
RETRY_SECONDS = 10.0
"""With the API down: how long a stale answer serves before the API is asked again."""
TIMEOUT_SECONDS = 5.0
MAX_TOKEN = 8 * 1024
"""Characters."""
MAX_ACCEPTED = 32_768
MAX_REFUSED = 4_096
MAX_CONCURRENT = 32
EXTRA_POD_NAME = "authentication.kubernetes.io/pod-name"
EXTRA_POD_UID = "authentication.kubernetes.io/pod-uid"


class TokenRefusedError(Exception):
    """The API server, or a look at the token itself, says no. The message has no part of the token."""


class TokenUnavailableError(Exception):
    """The API server cannot be asked, and no earlier answer is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The pod that a token is bound to."""

    namespace: str
    service_account: str
    pod_name: str
    pod_uid: str


@dataclass(slots=True)
class _Accepted:
    identity: Identity
    fresh_until: float
    expires: float


def _claims(token: str) -> dict[str, Any]:
    """The JWT's claims, *unverified* (RFC 7519): only good for refusing early and for the cache's bounds."""
    parts = token.split(".")
    if len(token) > MAX_TOKEN or len(parts) != 3:
        raise TokenRefusedError("not a service-account token")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        raise TokenRefusedError("not a service-account token") from None
    if not isinstance(claims, dict):
        raise TokenRefusedError("not a service-account token")
    return claims


def _check_claims(token: str, audience: str, now: float) -> float:
    """The time at which the token expires. Raises TokenRefusedError when no review could accept it."""
    claims = _claims(token)
    audiences, expires = claims.get("aud"), claims.get("exp")
    if audience not in (audiences if isinstance(audiences, list) else [audiences]):
        raise TokenRefusedError(f"the token is not for the audience {audience}")
    if not isinstance(expires, int | float) or isinstance(expires, bool):
        raise TokenRefusedError("the token has no time of expiry")
    if expires <= now:
        raise TokenRefusedError("the token has expired")
    return float(expires)


def identity_of(status: Object, audience: str) -> Identity:
    """The identity in a TokenReview's status. Raises TokenRefusedError when it holds none for us."""
    if status.get("authenticated") is not True:
        raise TokenRefusedError("the API server does not know the token")
    if audience not in (status.get("audiences") or []):
        raise TokenRefusedError(f"the token is not for the audience {audience}")
    user = status.get("user") or {}
    kind, _, rest = str(user.get("username", "")).partition(":serviceaccount:")
    namespace, _, account = rest.partition(":")
    extra = user.get("extra") or {}
    names, uids = extra.get(EXTRA_POD_NAME) or [], extra.get(EXTRA_POD_UID) or []
    if kind != "system" or not namespace or not account or len(uids) != 1:
        raise TokenRefusedError("the token is not bound to a pod")
    return Identity(
        namespace=namespace, service_account=account, pod_name=names[0] if names else "", pod_uid=uids[0]
    )


class TokenReviewer:
    """Answers `identity(token)` from its cache, else from the API server.

    Only SHA-256 digests of tokens are kept.
    """

    def __init__(
        self,
        api: Api,
        *,
        clock: Clock,
        audience: str = TOKEN_AUDIENCE,
        on_review: Callable[[str], None] = lambda result: None,
    ) -> None:
        self._api = api
        self._clock = clock
        self._audience = audience
        self._on_review = on_review
        self._accepted: OrderedDict[bytes, _Accepted] = OrderedDict()
        self._refused: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[Identity]] = {}
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def identity(self, token: str) -> Identity:
        """Raises TokenRefusedError or TokenUnavailableError."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        now = self._clock.time()
        known = self._accepted.get(digest)
        if known is not None and now < known.fresh_until:
            return known.identity
        until, why = self._refused.get(digest, (0.0, ""))
        if now < until:
            raise TokenRefusedError(why)
        expires = _check_claims(token, self._audience, now)
        task = self._running.get(digest)
        if task is None:
            task = asyncio.ensure_future(self._review(digest, token, expires))
            self._running[digest] = task
            task.add_done_callback(lambda done: self._finished(digest, done))
        # One caller's hanging up must not end the review that others wait for.
        return await asyncio.shield(task)

    def _finished(self, digest: bytes, task: asyncio.Task[Identity]) -> None:
        self._running.pop(digest, None)
        if not task.cancelled():
            task.exception()  # retrieved, also when every caller has hung up

    async def _review(self, digest: bytes, token: str, expires: float) -> Identity:
        try:
            status = await self._ask(token)
        except (ApiError, TimeoutError) as error:
            return self._stale(digest, error)
        now = self._clock.time()
        try:
            identity = identity_of(status, self._audience)
        except TokenRefusedError as refusal:
            self._on_review("refused")
            self._accepted.pop(digest, None)
            _put(self._refused, digest, (now + REFUSED_SECONDS, str(refusal)), MAX_REFUSED)
            raise
        self._on_review("accepted")
        fresh_until = min(expires, now + REVIEW_SECONDS)
        _put(self._accepted, digest, _Accepted(identity, fresh_until, expires), MAX_ACCEPTED)
        return identity

    async def _ask(self, token: str) -> Object:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [self._audience]},
        }
        async with asyncio.timeout(TIMEOUT_SECONDS), self._slots:
            review = await self._api.create(TOKEN_REVIEWS, None, body)
        return dict(review.get("status") or {})

    def _stale(self, digest: bytes, error: Exception) -> Identity:
        """The earlier answer, while the token itself is still valid."""
        self._on_review("error")
        now = self._clock.time()
        known = self._accepted.get(digest)
        if known is None or now >= known.expires:
            # ApiError's text is the server's Status message, which never repeats a request's body.
            raise TokenUnavailableError(f"TokenReview failed: {error or 'no answer in time'}") from None
        known.fresh_until = min(known.expires, now + RETRY_SECONDS)
        return known.identity


def _put(cache: OrderedDict[bytes, Any], digest: bytes, value: Any, limit: int) -> None:
    cache[digest] = value
    cache.move_to_end(digest)
    while len(cache) > limit:
        cache.popitem(last=False)
