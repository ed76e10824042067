"""A run on a cluster and what can be done to it: submit, watch, kill a rank, delete a pod.

Used by the demo, the cluster tests and the benches, so that they all do the same things the same way.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from devcluster.environment import Environment, credentials_secret
from devcluster.errors import DevclusterError

CHECKOUT = Path(__file__).resolve().parent.parent
SECRET = "s3-credentials"  # noqa: S105 - a name
SCRIPT = "digits"

# Workers are named rank<n> (prctl), as are their DataLoader workers, which are younger. The environment would not
# tell: /proc/<pid>/environ of a forked process is its parent's. The time is taken inside the pod, right after the
# kill, so that kubectl's own second does not count as recovery.
KILL = """
import os, pathlib, sys, time
rank, sig = sys.argv[1:]
pids = [int(p.parent.name) for p in pathlib.Path('/proc').glob('[0-9]*/comm') if p.read_text().strip() == f'rank{rank}']
if not pids: sys.exit(f'rank {rank}: no such process')
os.kill(min(pids), int(sig)); print(time.time())
"""


def parse_time(text: str) -> float:
    """Unix seconds of an RFC 3339 time; 0.0 for an empty one."""
    return datetime.datetime.fromisoformat(text).timestamp() if text else 0.0


class Scenario:
    """One namespace with the example's script and the S3 credentials in it; removed at the end."""

    def __init__(self, env: Environment, namespace: str) -> None:
        self.env = env
        self.kubectl = env.kubectl
        self.namespace = namespace

    def __enter__(self) -> Scenario:
        namespace = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": self.namespace,
                "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
            },
        }
        self.kubectl.apply(yaml.safe_dump(namespace))
        self.kubectl.apply(credentials_secret(SECRET, self.namespace, self.env.s3))
        self.add_script(SCRIPT, CHECKOUT / "examples" / "digits" / "train.py")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, wait: bool = True) -> None:
        """Delete the namespace; with `wait` return when it is gone (bounded)."""
        how = ["--timeout=120s"] if wait else ["--wait=false"]
        self.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", *how, seconds=130)

    def add_script(self, name: str, source: Path | str) -> None:
        """A ConfigMap `name` with key train.py."""
        text = source.read_text() if isinstance(source, Path) else source
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": self.namespace},
            "data": {"train.py": text},
        }
        self.kubectl.apply(yaml.safe_dump(body))

    def spec(
        self,
        *,
        script: str = SCRIPT,
        args: list[str] | None = None,
        nodes: int = 2,
        processes: int = 2,
        every_steps: int = 10,
        **more: Any,
    ) -> dict[str, Any]:
        """A spec that works here; `more` are further fields, taken as they are."""
        checkpoint: dict[str, Any] = {
            "uri": f"{self.env.s3.uri}/{self.namespace}",
            "interval": {"steps": every_steps},
            "credentialsSecret": {"name": SECRET},
        }
        if self.env.s3.endpoint:
            checkpoint["endpoint"] = self.env.s3.endpoint
        return {
            "image": self.env.trainer_image,
            "nodes": {"min": nodes},
            "processesPerNode": processes,
            "script": {"configMap": {"name": script}},
            "args": args or [],
            "preload": ["sklearn.datasets"],
            "checkpoint": checkpoint,
            "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
            **more,
        }

    def submit(self, name: str, spec: dict[str, Any]) -> None:
        """kubectl apply of a TrainingRun."""
        self.kubectl.apply(yaml.safe_dump(self.manifest(name, spec)))

    def manifest(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        return {
            "apiVersion": "trainyard.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": spec,
        }

    def patch(self, name: str, change: dict[str, Any]) -> None:
        """Merge patch of a TrainingRun."""
        self.kubectl("-n", self.namespace, "patch", "tr", name, "--type=merge", "-p", json.dumps(change))

    def run(self, name: str) -> dict[str, Any]:
        """The TrainingRun object."""
        return self.kubectl.json("-n", self.namespace, "trainingrun", name)

    def status(self, name: str) -> dict[str, Any]:
        return self.run(name).get("status") or {}

    def wait(
        self, name: str, what: str, ready: Callable[[dict[str, Any]], bool], *, seconds: float
    ) -> dict[str, Any]:
        """The first status for which `ready` holds. A run that has failed, or the bound, raises with the story."""
        end = time.monotonic() + seconds
        while True:
            status = self.status(name)
            if ready(status):
                return status
            if status.get("phase") in ("Failed", "Complete") or time.monotonic() > end:
                why = (
                    "the run ended"
                    if status.get("phase") in ("Failed", "Complete")
                    else f"{seconds:.0f} s passed"
                )
                raise DevclusterError(f"waiting for {what}: {why} first\n{self.explain(name)}")
            time.sleep(0.2)

    def condition(self, status: dict[str, Any], kind: str) -> dict[str, Any]:
        return next((c for c in status.get("conditions", []) if c["type"] == kind), {})

    def explain(self, name: str) -> str:
        """What a person would look at: status, pods, Events, last log lines."""
        parts = [yaml.safe_dump(self.status(name), sort_keys=False)]
        selector = ("-l", f"trainyard.dev/run={name}")
        for args in (
            ("get", "pods", "-o", "wide", *selector),
            ("get", "events.events.k8s.io", "--sort-by=.metadata.creationTimestamp"),
            ("logs", *selector, "--tail=15", "--prefix", "--max-log-requests=20"),
        ):
            try:
                parts.append(self.kubectl("-n", self.namespace, *args)[-5000:])
            except DevclusterError as error:
                parts.append(str(error))
        return "\n".join(parts)

    def pods(self, name: str) -> dict[int, dict[str, Any]]:
        """Live pods by node index: {"name", "uid", "node"}; terminating ones are left out, and those that clean up."""
        found = {}
        members = f"trainyard.dev/run={name},trainyard.dev/node-index"
        for pod in self.kubectl.json("-n", self.namespace, "pods", "-l", members)["items"]:
            meta = pod["metadata"]
            if "deletionTimestamp" in meta or pod["status"].get("phase") in ("Failed", "Succeeded"):
                continue
            index = int(meta["labels"]["trainyard.dev/node-index"])
            found[index] = {"name": meta["name"], "uid": meta["uid"], "node": pod["spec"].get("nodeName")}
        return found

    def kill_rank(self, name: str, rank: int, *, per_node: int, signal: int = 9) -> float:
        """Kill one worker process; Unix seconds of the kill by the pod's clock."""
        pod = self.pods(name)[rank // per_node]["name"]
        out = self.kubectl(
            "-n",
            self.namespace,
            "exec",
            pod,
            "-c",
            "trainer",
            "--",
            "python3",
            "-c",
            KILL,
            str(rank),
            str(signal),
        )
        return float(out)

    def delete_pod(self, name: str, index: int, *, force: bool = False) -> float:
        """Delete one pod as a user would; Unix seconds at which it was asked."""
        pod = self.pods(name)[index]["name"]
        began = time.time()
        self.kubectl(
            "-n",
            self.namespace,
            "delete",
            "pod",
            pod,
            "--wait=false",
            *(["--force", "--grace-period=0"] if force else []),
        )
        return began

    def logs(self, name: str, index: int = 0, *, tail: int = -1) -> str:
        """Log of the newest pod with that index, also when it has ended."""
        pods = self.kubectl.json(
            "-n", self.namespace, "pods", "-l", f"trainyard.dev/run={name},trainyard.dev/node-index={index}"
        )["items"]
        if not pods:
            raise DevclusterError(f"run {name}: no pod with index {index}")
        newest = max(pods, key=lambda p: int(p["metadata"]["labels"]["trainyard.dev/created-in-attempt"]))
        return self.kubectl("-n", self.namespace, "logs", newest["metadata"]["name"], f"--tail={tail}")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events about the run, oldest first."""
        items = self.kubectl.json("-n", self.namespace, "events.events.k8s.io")["items"]
        mine = [
            e for e in items if e["regarding"].get("kind") == "TrainingRun" and e["regarding"]["name"] == name
        ]
        return sorted(mine, key=lambda e: e["metadata"]["creationTimestamp"])

    def operator_pod(self) -> str:
        """Name of the operator's pod that is not going away."""
        from devcluster.install import NAMESPACE

        pods = self.kubectl.json("-n", NAMESPACE, "pods")["items"]
        live = [p["metadata"]["name"] for p in pods if "deletionTimestamp" not in p["metadata"]]
        return live[0]
