"""What the operator's ServiceAccount, and people with the usual roles, may and may not do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from devcluster.cluster import ControlPlane
from tests.control_plane.manifests import training_run
from tests.control_plane.server import RUNS, Server
from tests.control_plane.test_deploy_manifests import DEPLOY, SYSTEM, documents

OPERATOR = f"system:serviceaccount:{SYSTEM}:trainyard-operator"
REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"


@dataclass(frozen=True, slots=True)
class Act:
    """`kubectl auth can-i verb resource.group/subresource --namespace`; name "" is any."""

    verb: str
    resource: str
    group: str = ""
    namespace: str = "default"
    name: str = ""

    def __str__(self) -> str:
        where = self.namespace or "cluster"
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''} {self.name} in {where}"


RUN, CRDS = "trainyard.dev", "apiextensions.k8s.io"
OUR_CRD = "trainingruns.trainyard.dev"

MAY = [
    *(Act(verb, "trainingruns", RUN) for verb in ("get", "list", "watch", "delete", "patch")),
    *(Act(verb, "trainingruns", RUN, namespace="") for verb in ("list", "watch")),
    Act("patch", "trainingruns/status", RUN),
    Act("update", "trainingruns/finalizers", RUN),
    *(Act(verb, "pods") for verb in ("get", "list", "watch", "create", "delete")),
    *(Act(verb, "pods", namespace="") for verb in ("list", "watch")),
    *(Act(verb, "events", "events.k8s.io") for verb in ("create", "patch")),
    Act("list", "events"),
    Act("create", "tokenreviews", "authentication.k8s.io", namespace=""),
    Act("get", "customresourcedefinitions", CRDS, namespace="", name=OUR_CRD),
    Act("create", "leases", "coordination.k8s.io", SYSTEM),
    *(Act(verb, "leases", "coordination.k8s.io", SYSTEM, "trainyard-operator") for verb in ("get", "update")),
]

MAY_NOT = [
    *(Act(verb, "secrets", namespace=ns) for verb in ("get", "list", "watch", "create") for ns in ("default", SYSTEM)),
    *(Act("create", f"pods/{sub}") for sub in ("exec", "attach", "portforward", "proxy", "eviction", "ephemeralcontainers")),
    *(Act(verb, "pods") for verb in ("update", "patch", "deletecollection")),
    Act("get", "pods/log"),
    Act("patch", "pods/status"),
    *(Act(verb, "trainingruns", RUN) for verb in ("create", "update", "deletecollection")),
    Act("update", "trainingruns/status", RUN),
    *(Act(verb, resource) for verb in ("get", "list", "create") for resource in ("configmaps", "serviceaccounts", "services")),
    Act("create", "serviceaccounts/token"),
    Act("get", "nodes", namespace=""),
    Act("list", "namespaces", namespace=""),
    Act("list", "customresourcedefinitions", CRDS, namespace=""),
    Act("get", "customresourcedefinitions", CRDS, namespace="", name="other.example.com"),
    Act("update", "customresourcedefinitions", CRDS, namespace="", name=OUR_CRD),
    Act("get", "leases", "coordination.k8s.io", SYSTEM, "other"),
    Act("update", "leases", "coordination.k8s.io", "kube-system", "kube-scheduler"),
    Act("delete", "leases", "coordination.k8s.io", SYSTEM, "trainyard-operator"),
    *(Act("create", r, "rbac.authorization.k8s.io") for r in ("roles", "rolebindings", "clusterroles", "clusterrolebindings")),
    Act("escalate", "clusterroles", "rbac.authorization.k8s.io", namespace=""),
    Act("impersonate", "users", namespace=""),
    Act("create", "validatingwebhookconfigurations", "admissionregistration.k8s.io", namespace=""),
    Act("create", "jobs", "batch"),
    Act("create", "deployments", "apps"),
    Act("*", "*", "*"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def installed(control_plane: ControlPlane, server: Server) -> None:
    control_plane.kubectl("apply", "-f", DEPLOY / "namespace.yaml", "-f", DEPLOY / "rbac.yaml")
    # The authorizer learns of roles and bindings by watching each kind: its first answers may be too early.
    for act in (MAY[0], MAY[-1]):
        _until_allowed(server, OPERATOR, act)


def allowed(server: Server, user: str, act: Act) -> bool:
    """As `kubectl auth can-i` asks it."""
    resource, _, subresource = act.resource.partition("/")
    asked = {
        "verb": act.verb,
        "group": act.group,
        "resource": resource,
        "subresource": subresource,
        "namespace": act.namespace,
        "name": act.name,
    }
    groups = ["system:authenticated", *(["system:serviceaccounts"] if user == OPERATOR else [])]
    review = {"spec": {"user": user, "groups": groups, "resourceAttributes": asked}}
    return bool(server.create(REVIEWS, review)["status"]["allowed"])


@pytest.mark.parametrize("act", MAY, ids=str)
def test_the_operator_may(server: Server, act: Act) -> None:
    assert allowed(server, OPERATOR, act)


@pytest.mark.parametrize("act", MAY_NOT, ids=str)
def test_the_operator_may_not(server: Server, act: Act) -> None:
    assert not allowed(server, OPERATOR, act)


def test_the_table_above_is_all_that_is_granted() -> None:
    """A verb that is added to rbac.yaml must be added here too."""
    granted = {
        (verb, resource, group)
        for role in documents("ClusterRole", "Role")
        if role["metadata"]["name"] == "trainyard-operator"
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
    }
    assert granted == {(a.verb, a.resource, a.group) for a in MAY}
    assert len(granted) <= 40


USERS = {
    "view": ({"get", "list", "watch"}, {"get"}),
    "edit": ({"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}, {"get"}),
    "admin": ({"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}, {"get"}),
}
VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")


@pytest.mark.parametrize("role", USERS)
def test_people_get_it_with_the_clusters_roles(
    control_plane: ControlPlane, server: Server, namespace: str, role: str
) -> None:
    """view sees runs, edit and admin make them; nobody but the operator writes their status."""
    user = f"{role}@example.com"
    control_plane.kubectl(
        "-n", namespace, "create", "rolebinding", role, f"--clusterrole={role}", f"--user={user}"
    )
    runs, status = USERS[role]
    for verb in (min(runs), max(runs)):  # one of each of our roles: a controller aggregates them, one by one
        _until_allowed(server, user, Act(verb, "trainingruns", RUN, namespace))
    assert {v for v in VERBS if allowed(server, user, Act(v, "trainingruns", RUN, namespace))} == runs
    assert {
        v for v in VERBS if allowed(server, user, Act(v, "trainingruns/status", RUN, namespace))
    } == status
    assert not allowed(server, user, Act("get", "trainingruns", RUN, "default")), "only where it was bound"


def test_an_editor_cannot_fake_a_status(control_plane: ControlPlane, server: Server, namespace: str) -> None:
    """The real request, not only the review."""
    user = "editor@example.com"
    control_plane.kubectl(
        "-n", namespace, "create", "rolebinding", "e", "--clusterrole=edit", f"--user={user}"
    )
    _until_allowed(server, user, Act("create", "trainingruns", RUN, namespace))
    path = RUNS.format(namespace=namespace)
    faked = training_run() | {"status": {"phase": "Complete"}}
    made = server.create(path, faked, user=user)
    assert "status" not in made
    answer = server.request("PATCH", f"{path}/digits/status", {"status": {"phase": "Complete"}}, user=user)
    assert answer.code == 403


def _until_allowed(server: Server, user: str, act: Act) -> None:
    deadline = time.monotonic() + 20
    while not allowed(server, user, act):
        assert time.monotonic() < deadline, f"{user} may not {act} 20 s after the role was bound"
        time.sleep(0.05)
