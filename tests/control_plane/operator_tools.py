"""What the tests of the running operator share: its process with its real rights, a kubelet, agents.

The operator is `python -m trainyard_operator run` with the service account and the roles of operator/deploy.
The kubelet is the test, which writes pod statuses. Agents are tasks that speak the real protocol over HTTPS
with tokens that the API server issued for their pods.
"""

from __future__ import annotations

import asyncio
import base64
import calendar
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import yaml

from tests.control_plane.server import RUNS, Server
from tests.unit.coordinator_tools import certificate
from trainyard_api.contract import TOKEN_AUDIENCE
from trainyard_api.protocol import Action, AgentPhase, Beat, Checkpoint, Directive, Failure, Progress, Resumed

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM = "trainyard-system"
ACCOUNT = f"system:serviceaccount:{SYSTEM}:trainyard-operator"
PATIENCE = 30.0
"""Seconds; the bound of every wait here."""
WRITES = ("create", "update", "patch", "delete", "deletecollection")


async def until(what: str, check: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first truthy answer of `check`; AssertionError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        await asyncio.sleep(0.05)
    return found


# ---- the cluster ------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """One test's namespace, seen with the administrator's rights."""

    server: Server
    namespace: str
    audit_log: Path

    @property
    def pods_path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @property
    def runs_path(self) -> str:
        return RUNS.format(namespace=self.namespace)

    def apply(self, run: dict[str, Any]) -> dict[str, Any]:
        return dict(self.server.create(self.runs_path, run))

    def run(self, name: str) -> dict[str, Any]:
        answer = self.server.request("GET", f"{self.runs_path}/{name}")
        assert answer.code == 200, answer.body
        return dict(answer.body)

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.run(name).get("status") or {})

    def patch(self, path: str, body: Any) -> dict[str, Any]:
        answer = self.server.request("PATCH", path, body)
        assert answer.code == 200, answer.body
        return dict(answer.body)

    def is_true(self, name: str, condition: str) -> bool:
        found = self.status(name).get("conditions") or []
        return any(c["type"] == condition and c["status"] == "True" for c in found)

    def pods(self) -> list[dict[str, Any]]:
        """By name, without those that are on their way out."""
        items = self.server.request("GET", self.pods_path).body["items"]
        return sorted(
            (p for p in items if "deletionTimestamp" not in p["metadata"]),
            key=lambda p: p["metadata"]["name"],
        )

    def start_pods(self) -> list[dict[str, Any]]:
        """Plays the kubelet: every pending pod gets an address and runs. Returns all pods."""
        for number, pod in enumerate(self.pods(), start=1):
            if pod["status"].get("phase") == "Pending":
                state = {"name": "trainer", "ready": True, "restartCount": 0, "image": "x", "imageID": "x"}
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                address = f"10.9.{len(pod['metadata']['name']) % 200}.{number}"
                status = {
                    "phase": "Running",
                    "podIP": address,
                    "podIPs": [{"ip": address}],
                    "containerStatuses": [{**state, "state": {"running": {"startedAt": now}}}],
                }
                self.patch(f"{self.pods_path}/{pod['metadata']['name']}/status", {"status": status})
        return self.pods()

    def token(self, pod: dict[str, Any], *, audience: str = TOKEN_AUDIENCE) -> str:
        """What the kubelet would project into the pod."""
        bound = {
            "kind": "Pod",
            "apiVersion": "v1",
            "name": pod["metadata"]["name"],
            "uid": pod["metadata"]["uid"],
        }
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default/token"
        spec = {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound}
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str(self.server.create(path, request)["status"]["token"])

    def operator_writes(self, since: float) -> list[str]:
        """ "verb resource/name" of all that operators wrote in this namespace since then (Unix seconds); leases
        are not counted, and TokenReviews belong to no namespace."""
        found = []
        for line in self.audit_log.read_text().splitlines():
            entry = json.loads(line)
            ref = entry.get("objectRef") or {}
            began = _unix(entry["requestReceivedTimestamp"])
            if (
                entry["user"].get("username") == ACCOUNT  # a refused stranger has no name
                and entry["verb"] in WRITES
                and ref.get("namespace") == self.namespace
                and ref.get("resource") != "leases"
                and began >= since
            ):
                found.append(f"{entry['verb']} {ref['resource']}/{ref.get('name', '')}")
        return found


def _unix(stamp: str) -> float:
    whole, _, fraction = stamp.removesuffix("Z").partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{fraction or 0}")


def install_rights(server: Server, namespace: str, lease: str) -> str:
    """The operator's account and roles as operator/deploy has them, and its lease's role in `namespace`.

    Returns a token of that account.
    """
    server.request("POST", "/api/v1/namespaces", {"metadata": {"name": SYSTEM}})
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    documents = list(yaml.safe_load_all((REPOSITORY / "operator/deploy/rbac.yaml").read_text()))
    for document in documents:
        space = document["metadata"].get("namespace")
        base = "/api/v1" if document["kind"] == "ServiceAccount" else rbac
        plural = document["kind"].lower() + "s"
        path = f"{base}/namespaces/{space}/{plural}" if space else f"{base}/{plural}"
        answer = server.request("POST", path, document)
        assert answer.code in (201, 409), answer.body
        if document["kind"] in ("Role", "RoleBinding"):  # the same for a lease in the test's namespace
            copy = json.loads(json.dumps(document))
            copy["metadata"]["namespace"] = namespace
            for rule in copy.get("rules", ()):
                if "resourceNames" in rule:
                    rule["resourceNames"] = [lease]
            answer = server.request("POST", f"{rbac}/namespaces/{namespace}/{plural}", copy)
            assert answer.code in (201, 409), answer.body
    path = f"/api/v1/namespaces/{SYSTEM}/serviceaccounts/trainyard-operator/token"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    return str(server.create(path, request)["status"]["token"])


# ---- the operator -----------------------------------------------------------------------------------


@dataclass
class Operator:
    """Starts operator processes for one namespace. `kubeconfig` is the administrator's."""

    kubeconfig: Path
    server: Server
    namespace: str
    folder: Path
    lease: str = "trainyard-operator"
    lease_seconds: float = 3.0
    running: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cert, self.key = certificate(self.folder)
        self.token = install_rights(self.server, self.namespace, self.lease)

    def kubeconfig_of_operator(self, server: str | None = None) -> Path:
        """With the operator's own token; `server` replaces the URL."""
        config = yaml.safe_load(self.kubeconfig.read_text())
        (cluster,) = config["clusters"]
        authority = cluster["cluster"].pop("certificate-authority", None)
        if authority is not None:
            data = base64.b64encode((self.kubeconfig.parent / authority).read_bytes()).decode()
            cluster["cluster"]["certificate-authority-data"] = data
        if server is not None:
            cluster["cluster"]["server"] = server
        config["users"] = [{"name": "operator", "user": {"token": self.token}}]
        config["contexts"] = [{"name": "it", "context": {"cluster": cluster["name"], "user": "operator"}}]
        config["current-context"] = "it"
        path = self.folder / f"kubeconfig-{uuid.uuid4().hex[:6]}"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(config))
        return path

    def start(self, *, server: str | None = None, **variables: str) -> Process:
        """Starts one; does not wait for it to be ready."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY / "operator"),
            "TRAINYARD_KUBECONFIG": str(self.kubeconfig_of_operator(server)),
            "TRAINYARD_NAMESPACES": self.namespace,
            "TRAINYARD_LEASE_NAMESPACE": self.namespace,
            "TRAINYARD_LEASE_NAME": self.lease,
            "TRAINYARD_LEASE_DURATION": str(self.lease_seconds),
            "TRAINYARD_COORDINATOR_BIND": "127.0.0.1:0",
            "TRAINYARD_COORDINATOR_URL": "https://localhost:8443",
            "TRAINYARD_COORDINATOR_CERT": str(self.cert),
            "TRAINYARD_COORDINATOR_KEY": str(self.key),
            "TRAINYARD_COORDINATOR_CA": str(self.cert),
            "TRAINYARD_WEB_BIND": "127.0.0.1:0",
            "TRAINYARD_LOG_FORMAT": "text",
            "TRAINYARD_STATUS_INTERVAL": "2",
            **variables,
        }
        log = self.folder / f"operator-{len(self.running)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainyard_operator", "run"],
                env=environment,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
            )
        started = Process(process, log, self.cert)
        self.running.append(started)
        return started

    async def ready(self, **variables: str) -> Process:
        """Starts one and waits until it leads."""
        process = self.start(**variables)
        await process.until_ready()
        return process

    def stop_all(self) -> None:
        for process in self.running:
            process.kill()


@dataclass
class Process:
    """One operator process."""

    popen: subprocess.Popen[bytes]
    log_file: Path
    cert: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def ports(self) -> tuple[int, int] | None:
        """(web, coordinator) as logged; None before."""
        found = re.search(r"metrics on port (\d+), coordinator on port (\d+)", self.log)
        return (int(found[1]), int(found[2])) if found else None

    def web(self, path: str) -> tuple[int, str]:
        """Status and text of one of the probes or /metrics; (0, "") before it listens."""
        ports = self.ports()
        if ports is None:
            return 0, ""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    async def until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while (await asyncio.to_thread(self.web, "/readyz"))[0] != 200:
            assert self.alive, f"the operator ended with {self.popen.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"not ready after {PATIENCE:g} s:\n{self.log}"
            await asyncio.sleep(0.05)

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal and returns the exit code."""
        self.popen.send_signal(number)
        try:
            return await asyncio.to_thread(self.popen.wait, PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {PATIENCE:g} s of {number.name}:\n{self.log}") from None

    def kill(self) -> None:
        if self.alive:
            self.popen.kill()
        self.popen.wait(10)


# ---- the network ------------------------------------------------------------------------------------


class Proxy:
    """TCP in front of the API server, which can be cut."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.open: set[asyncio.StreamWriter] = set()
        self.cut = False
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.cut:
            writer.transport.abort()
            return
        upstream_reader, upstream = await asyncio.open_connection(*self.target)
        self.open |= {writer, upstream}
        try:
            await asyncio.gather(pump(reader, upstream), pump(upstream_reader, writer))
        finally:
            self.open -= {writer, upstream}
            for end in (writer, upstream):
                end.close()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, server: str) -> AsyncIterator[Proxy]:
        """In front of this https URL."""
        url = urlsplit(server)
        assert url.hostname and url.port
        made = cls((url.hostname, url.port))
        listening = await asyncio.start_server(made.handle, "127.0.0.1", 0)
        made.port = listening.sockets[0].getsockname()[1]
        try:
            yield made
        finally:
            listening.close()
            made.cut = True
            made.break_all()
            await asyncio.sleep(0.05)

    def break_all(self) -> None:
        for writer in list(self.open):
            writer.transport.abort()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


# ---- agents -----------------------------------------------------------------------------------------


class Agent:
    """An agent that obeys: beats, long-polls, and plays the workers' part as the test says.

    `home()` gives the operator process to call; None while there is none.
    """

    def __init__(
        self, cluster: Cluster, run: dict[str, Any], pod: dict[str, Any], home: Callable[[], Process | None]
    ) -> None:
        labels = pod["metadata"]["labels"]
        self.run_uid = run["metadata"]["uid"]
        self.run_name = run["metadata"]["name"]
        self.name = pod["metadata"]["name"]
        self._cluster = cluster
        self._home = home
        self.token = cluster.token(pod)
        self.beat = Beat(
            pod_name=self.name,
            pod_uid=pod["metadata"]["uid"],
            incarnation=uuid.uuid4().hex,
            node_index=int(labels["trainyard.dev/node-index"]),
            pod_ip=pod["status"]["podIP"],
            ready=True,
        )
        self.heard: list[Directive] = []
        """Directives in order, without repetitions."""
        self.persisted: list[int] = []
        """status.attempt as the API server had it when each of them was heard."""
        self.statuses: list[int] = []
        """HTTP status codes in order."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def told(self) -> Directive | None:
        return self.heard[-1] if self.heard else None

    def runs(self, attempt: int) -> bool:
        """Whether it was told to run this attempt, and does."""
        return self.beat.attempt == attempt and self.beat.phase is AgentPhase.RUNNING

    def say(self, **changes: Any) -> None:
        """Changes the next beat, which is sent at once."""
        self.beat = replace(self.beat, **changes)
        self._changed.set()

    def fail(self, message: str = "boom") -> None:
        failure = Failure(
            attempt=self.beat.attempt, rank=self.beat.node_index, local_rank=0, exit_code=1,
            exception="ValueError", message=message, time=time.time(),
        )  # fmt: skip
        self.say(phase=AgentPhase.FAILED, failure=failure)

    def succeed(self) -> None:
        self.say(phase=AgentPhase.SUCCEEDED)

    async def post(
        self,
        beat: Beat | None = None,
        *,
        token: str | None = None,
        session: aiohttp.ClientSession | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """One beat; status 0 when nobody is there."""
        process = self._home()
        ports = process.ports() if process is not None and process.alive else None
        if process is None or ports is None:
            return 0, {}
        async with contextlib.AsyncExitStack() as stack:
            session = session or await stack.enter_async_context(_session(process.cert))
            try:
                async with session.post(
                    f"https://localhost:{ports[1]}/v1/runs/{self.run_uid}/beat",
                    json=(beat or self.beat).to_json(),
                    headers={"Authorization": f"Bearer {token or self.token}"},
                ) as answer:
                    return answer.status, await answer.json()
            except (aiohttp.ClientError, TimeoutError):
                return 0, {}

    async def live(self) -> None:
        """Beats until it is told to exit, or cancelled."""
        async with _session(self._home_cert()) as session:
            while True:
                self._changed.clear()
                status, body = await self._poll(session)
                self.statuses.append(status)
                if status != 200:
                    await asyncio.sleep(0.1)
                    continue
                if not self._obey(Directive.from_json(body)):
                    return

    def _home_cert(self) -> Path:
        process = self._home()
        assert process is not None
        return process.cert

    async def _poll(self, session: aiohttp.ClientSession) -> tuple[int, dict[str, Any]]:
        """A beat that is given up when there is something newer to say."""
        request = asyncio.ensure_future(self.post(replace(self.beat, wait=2.0), session=session))
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait((request, changed), return_when=asyncio.FIRST_COMPLETED)
            return request.result() if request.done() else (-1, {})
        finally:
            request.cancel()
            changed.cancel()
            await asyncio.gather(request, changed, return_exceptions=True)

    def _obey(self, directive: Directive) -> bool:
        if not self.heard or directive.revision != self.heard[-1].revision:
            self.persisted.append(self._cluster.status(self.run_name).get("attempt", 0))
            self.heard.append(directive)
        beat = replace(self.beat, seen=directive.revision)
        if directive.action is Action.EXIT:
            return False
        if directive.action is Action.HOLD and directive.attempt > beat.attempt:
            beat = replace(
                beat,
                attempt=directive.attempt,
                phase=AgentPhase.IDLE,
                failure=None,
                resumed=None,
                progress=None,
            )
        fresh = beat.attempt != directive.attempt or beat.phase is AgentPhase.IDLE
        if directive.action is Action.RUN and fresh:
            start = beat.checkpoint.step if beat.checkpoint else 0
            beat = replace(
                beat,
                attempt=directive.attempt,
                phase=AgentPhase.RUNNING,
                failure=None,
                progress=Progress(step=start + 1, total_steps=100, loss=0.5, time=time.time()),
                resumed=Resumed(attempt=directive.attempt, step=start, first_step_time=time.time()),
            )
        self.beat = beat
        return True

    def commit(self, step: int) -> None:
        """As if a checkpoint of this step was committed."""
        self.say(
            checkpoint=Checkpoint(step=step, seq=step, uri=f"s3://bucket/{step}", time=time.time()),
            progress=Progress(step=step, total_steps=100, loss=0.4, time=time.time()),
        )


def _session(cert: Path) -> aiohttp.ClientSession:
    trust = ssl.create_default_context(cafile=str(cert))
    connector = aiohttp.TCPConnector(ssl=trust, limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=10))


@contextlib.asynccontextmanager
async def living(agents: list[Agent]) -> AsyncIterator[list[Agent]]:
    """Agents that beat for as long as the block lasts."""
    tasks = [asyncio.create_task(agent.live()) for agent in agents]
    try:
        yield agents
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
