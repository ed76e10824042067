"""Seconds from a failure to the first new step, side by side with stock torchrun on the same cluster.

* process: `kill -9` of a random rank of a TrainingRun
* pod: `kubectl delete pod` of a random pod of a TrainingRun, image present on the nodes
* torchrun: the same script, image, nodes and ranks as plain pods that run stock `torchrun` (c10d rendezvous,
  `--max-restarts`), `kill -9` of a random rank; it resumes from the same kind of checkpoint

The moment of a kill is taken inside the pod, right after it; the first new step is what the agent reports in
`status.attempts[].firstStepTime`, and for torchrun the time stamp that the kubelet puts on the log line of the step.
All clocks are this machine's.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from typing import Any

import yaml

from devcluster.environment import Environment, make
from devcluster.errors import DevclusterError
from devcluster.progress import say
from devcluster.scenario import SECRET, Scenario, parse_time
from tests.bench.main import spread

NODES, PROCESSES = 2, 2
ARGS = ["--epochs", "100000", "--batch-size", "32", "--step-delay", "0.05"]
BOUND = 120.0
STEP_LINE = re.compile(r"^(\S+) .*\bstep (\d+)/")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All three, in one run, one after the other."""
    env = make(args)
    rng = random.Random(1)
    with Scenario(env, "bench-recovery") as scenario:
        process, pod, lost = _ours(scenario, rng, args.trials)
    with Scenario(env, "bench-torchrun") as scenario:
        torchrun = _torchrun(scenario, rng, max(3, args.trials // 4))
    return {
        "seconds_to_first_new_step": {
            "process": spread(process),
            "pod": spread(pod),
            "stock torchrun, process": spread(torchrun),
        },
        "lost_steps": spread([float(n) for n in lost]),
        "shape": f"{NODES} nodes x {PROCESSES} processes, checkpoint every 10 steps, 0.05 s per step",
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'seconds from failure to first new step':<42} trials    p50    p99    min    max"]
    for name, s in result["seconds_to_first_new_step"].items():
        if s["trials"]:
            lines.append(
                f"  {name:<40} {s['trials']:>6} {s['p50']:>6.2f} {s['p99']:>6.2f} {s['min']:>6.2f} {s['max']:>6.2f}"
            )
    return "\n".join(lines)


def _ours(scenario: Scenario, rng: random.Random, trials: int) -> tuple[list[float], list[float], list[int]]:
    spec = scenario.spec(args=ARGS, nodes=NODES, processes=PROCESSES)
    spec["restartPolicy"] = {"maxRestarts": 10 * trials, "maxInfrastructureRestarts": 10 * trials}
    scenario.submit("run", spec)
    seconds: dict[str, list[float]] = {"process": [], "pod": []}
    lost: list[int] = []
    for kind in ("process", "pod"):
        for number in range(trials):
            status = scenario.wait("run", "training", _trains, seconds=BOUND)
            time.sleep(rng.uniform(1.0, 2.5))  # a random step; and the checkpoint before it is committed
            attempt = status["attempt"]
            if kind == "process":
                began = scenario.kill_rank("run", rng.randrange(NODES * PROCESSES), per_node=PROCESSES)
            else:
                began = scenario.delete_pod("run", rng.randrange(NODES))
            status = scenario.wait(
                "run",
                f"recovery from {kind} kill {number + 1}",
                lambda s, a=attempt: s["attempt"] > a and _trains(s),
                seconds=BOUND,
            )
            entry = status["attempts"][-1]
            seconds[kind].append(parse_time(entry["firstStepTime"]) - began)
            lost.append(entry.get("lostSteps") or 0)
            say(f"{kind} {number + 1}/{trials}: {seconds[kind][-1]:.2f} s, {lost[-1]} steps lost")
    scenario.kubectl("-n", scenario.namespace, "delete", "tr", "run", "--timeout=60s", seconds=70)
    return seconds["process"], seconds["pod"], lost


def _trains(status: dict[str, Any]) -> bool:
    return status.get("phase") == "Running" and bool(status["attempts"][-1].get("firstStepTime"))


# ---- stock torchrun ---------------------------------------------------------------------------------


def _torchrun(scenario: Scenario, rng: random.Random, trials: int) -> list[float]:
    pods = [f"stock-{i}" for i in range(NODES)]
    _create(scenario, pods[0], master="$(POD_IP)")
    address = _pod_ip(scenario, pods[0])
    for pod in pods[1:]:
        _create(scenario, pod, master=address)
    seconds = []
    for number in range(trials):
        _wait_step(scenario, pods[0], after=time.time())
        time.sleep(rng.uniform(1.0, 2.5))
        pod = rng.choice(pods)
        out = scenario.kubectl(
            "-n",
            scenario.namespace,
            "exec",
            pod,
            "--",
            "python3",
            "-c",
            KILL_STOCK,
            str(rng.randrange(PROCESSES)),
        )
        began = float(out)
        # Steps that were taken before the others noticed are not new: the restart prints its number anew.
        seconds.append(_wait_restart(scenario, pods[0], began) - began)
        say(f"stock torchrun {number + 1}/{trials}: {seconds[-1]:.2f} s")
    return seconds


KILL_STOCK = """
import os, pathlib, sys, time
mark = f'LOCAL_RANK={sys.argv[1]}\\0'.encode()
pids = [int(p.parent.name) for p in pathlib.Path('/proc').glob('[0-9]*/environ') if mark in p.read_bytes()]
os.kill(min(pids), 9); print(time.time())
"""


def _create(scenario: Scenario, name: str, *, master: str) -> None:
    env = scenario.env
    s3 = {
        "TRAINYARD_CHECKPOINT_URI": f"{env.s3.uri}/{scenario.namespace}",
        "TRAINYARD_CHECKPOINT_EVERY_STEPS": "10",
        "TRAINYARD_RUN_UID": "stock",
        "PYTHONUNBUFFERED": "1",
        # Without this, workers of a new round find gloo's addresses of the old one in the agents' shared store and
        # crash until max-restarts (seen here; pytorch #135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "HOME": "/tmp",  # noqa: S108 - inside the pod
    }
    if env.s3.endpoint:
        s3["TRAINYARD_CHECKPOINT_ENDPOINT"] = env.s3.endpoint
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    command = [
        "python3", "-m", "torch.distributed.run", f"--nnodes={NODES}", f"--nproc-per-node={PROCESSES}",
        "--rdzv-backend=c10d", f"--rdzv-endpoint={master}:29400", "--rdzv-id=stock", "--max-restarts=1000",
        f"--rdzv-conf=is_host={1 if name.endswith('-0') else 0}", "--local-addr=$(POD_IP)",
        "/trainyard-script/train.py", *ARGS, "--log-every", "1",
    ]  # fmt: skip
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": scenario.namespace},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "trainer",
                    "image": env.trainer_image,
                    "command": command,
                    "env": [
                        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                        *({"name": k, "value": v} for k, v in s3.items()),
                        *(
                            {"name": k, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": k}}}
                            for k in keys
                        ),
                    ],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "script", "mountPath": "/trainyard-script"}],
                }
            ],
            "volumes": [{"name": "script", "configMap": {"name": "digits"}}],
        },
    }
    scenario.kubectl.apply(yaml.safe_dump(body))


def _pod_ip(scenario: Scenario, name: str) -> str:
    found: list[str] = []

    def ready() -> bool:
        ip = scenario.kubectl.json("-n", scenario.namespace, "pod", name)["status"].get("podIP", "")
        found[:] = [ip]
        return bool(ip)

    scenario.kubectl.wait(f"pod {name} to have an IP", ready, seconds=60)
    return found[0]


def _steps(scenario: Scenario, pod: str) -> list[tuple[float, int]]:
    """(time, step) of the newest progress lines of rank 0."""
    log = scenario.kubectl("-n", scenario.namespace, "logs", pod, "--timestamps", "--tail=200")
    return [
        (parse_time(m.group(1)), int(m.group(2)))
        for line in log.splitlines()
        if (m := STEP_LINE.search(line))
    ]


def _wait_step(scenario: Scenario, pod: str, *, after: float) -> None:
    scenario.kubectl.wait(
        "a step of stock torchrun",
        lambda: any(t > after for t, _ in _steps(scenario, pod)),
        seconds=BOUND,
        explain=lambda: scenario.kubectl("-n", scenario.namespace, "logs", pod, "--tail=30"),
    )


def _wait_restart(scenario: Scenario, pod: str, began: float) -> float:
    """Time of the first progress line after the workers were started anew ("Seed set" is printed at each start)."""
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        log = scenario.kubectl(
            "-n", scenario.namespace, "logs", pod, "--timestamps", "--tail=300"
        ).splitlines()
        starts = [
            i for i, line in enumerate(log) if "Seed set" in line and parse_time(line.split()[0]) > began
        ]
        if starts:
            for line in log[starts[-1] :]:
                if m := STEP_LINE.search(line):
                    return parse_time(m.group(1))
        time.sleep(0.3)
    raise DevclusterError(f"stock torchrun took no step within {BOUND:.0f} s after a kill")


__all__ = ["Environment", "measure", "table"]
