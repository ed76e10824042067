"""The seam to the API server: what the rest of the operator may ask for. Fakes implement it in tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

Object = dict[str, Any]
"""A Kubernetes object as decoded JSON."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Where a kind lives in the API."""

    group: str
    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path; `namespace=None` is all namespaces, or a cluster-scoped resource."""
        base = f"/api/{self.version}" if not self.group else f"/apis/{self.group}/{self.version}"
        parts = [base]
        if self.namespaced and namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        parts += [p for p in (name, subresource) if p]
        return "/".join(parts)


PODS = Resource("", "v1", "pods")
RUNS = Resource("trainyard.dev", "v1alpha1", "trainingruns")
EVENTS = Resource("events.k8s.io", "v1", "events")
CORE_EVENTS = Resource("", "v1", "events")
"""The same objects by their older name, under which field selectors work."""
LEASES = Resource("coordination.k8s.io", "v1", "leases")
TOKEN_REVIEWS = Resource("authentication.k8s.io", "v1", "tokenreviews", namespaced=False)
CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False)


class ApiError(Exception):
    """An answer other than 2xx, or (status 0) no answer within the time-out."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        retry_after: float | None = None,
        causes: tuple[str, ...] = (),
    ) -> None:
        """`causes`: reasons in `details.causes` of a metav1.Status."""
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.causes = causes


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch. ERROR lines are raised as ApiError instead."""

    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    object: Object


class Api(Protocol):
    """Asynchronous client. Every call has a time-out of its own and raises ApiError."""

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object: ...

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 500,
    ) -> Object:
        """The whole list (all chunks), with `metadata.resourceVersion` to watch from."""
        ...

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object: ...

    async def merge_patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, subresource: str | None = None
    ) -> Object:
        """JSON merge patch. A `metadata.resourceVersion` in the body makes it conditional (409)."""
        ...

    async def replace(self, resource: Resource, namespace: str, name: str, body: Object) -> Object: ...

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_seconds: int | None = None,
        propagation: str | None = None,
    ) -> None:
        """With `uid` as a precondition: 409 if the object of that name is another."""
        ...

    def watch(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        resource_version: str,
        label_selector: str = "",
        timeout_seconds: int = 300,
    ) -> AsyncIterator[WatchEvent]:
        """Events with bookmarks until the server closes. Raises ApiError(410) when the version is too old,
        and ApiError(0) when nothing (not even a bookmark) came for the inactivity time-out."""
        ...
