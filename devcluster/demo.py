"""`./dev demo`: the whole story on a real cluster, told as it happens."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from devcluster.environment import Environment, make
from devcluster.errors import DevclusterError
from devcluster.progress import say
from devcluster.scenario import Scenario, parse_time

NAMESPACE = "trainyard-demo"
RUN = "digits"
EPOCHS = 24
BATCH = 32
PROCESSES = 2
BOUND = 300.0
"""Seconds for each act of the story; at the bound it says what it waited for and shows the run."""


def main(args: argparse.Namespace) -> int:
    """0 when the run completed after both failures."""
    began = time.monotonic()
    env = make(args, nodes=args.nodes)
    say(f"the cluster is ready after {time.monotonic() - began:.0f} s; now the run")
    with _Screen() as screen:
        scenario = Scenario(env, NAMESPACE).__enter__()  # stays: the user wants to look at it afterwards
        story(scenario, screen, nodes=2, step_delay=args.step_delay)
    say(f"the demo took {time.monotonic() - began:.0f} s")
    _what_next(env, args)
    return 0


def story(scenario: Scenario, screen: _Screen, *, nodes: int, step_delay: float) -> None:
    """Submit, kill a process, delete a pod, complete. Raises DevclusterError at a bound."""
    scenario.kubectl(
        "-n", NAMESPACE, "delete", "trainingrun", RUN, "--ignore-not-found", "--timeout=90s", seconds=100
    )
    args = ["--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--step-delay", str(step_delay)]
    scenario.submit(RUN, scenario.spec(args=args, nodes=nodes, processes=PROCESSES))
    screen.tell(
        f"applied TrainingRun {RUN}: {nodes} nodes x {PROCESSES} processes train scikit-learn's digits "
        f"for {EPOCHS} epochs, checkpoint to S3 every 10 steps"
    )
    status = _watch(scenario, screen, "the first step", lambda s: (s.get("step") or 0) > 0)
    total = status.get("totalSteps") or 300

    _watch(scenario, screen, "a quarter of the steps", lambda s: (s.get("step") or 0) >= total // 4)
    before = scenario.pods(RUN)
    rank = nodes * PROCESSES - 1
    killed = scenario.kill_rank(RUN, rank, per_node=PROCESSES)
    screen.tell(f"kill -9 of the worker process of rank {rank} (in pod {before[rank // PROCESSES]['name']})")
    _recovered(scenario, screen, killed)
    kept = {p["uid"] for p in before.values()} == {p["uid"] for p in scenario.pods(RUN).values()}
    screen.tell(
        "  every pod is the one it was: workers were restarted in place" if kept else "  pods were replaced"
    )

    _watch(scenario, screen, "60% of the steps", lambda s: (s.get("step") or 0) >= total * 6 // 10)
    name = scenario.pods(RUN)[0]["name"]
    killed = scenario.delete_pod(RUN, 0)
    screen.tell(f"kubectl delete pod {name} (node rank 0, the one others would lose the rendezvous with)")
    _recovered(scenario, screen, killed)

    _watch(scenario, screen, "the end", lambda s: s.get("phase") == "Complete")
    for line in scenario.logs(RUN, 0, tail=60).splitlines():
        if "validation accuracy" in line or "final weights" in line:
            screen.tell(f"  {line}")
    screen.tell(_table(scenario.status(RUN)))


def _watch(scenario: Scenario, screen: _Screen, what: str, ready: Any) -> dict[str, Any]:
    def look(status: dict[str, Any]) -> bool:
        screen.progress(status, scenario.condition(status, "Running").get("message", ""))
        return bool(ready(status))

    return scenario.wait(RUN, what, look, seconds=BOUND)


def _recovered(scenario: Scenario, screen: _Screen, since: float) -> None:
    """Wait for the first new step after a failure and tell what it cost."""

    def new_step(status: dict[str, Any]) -> bool:
        attempts = status.get("attempts") or [{}]
        return parse_time(attempts[-1].get("firstStepTime", "")) > since

    entry = _watch(scenario, screen, "the first new step", new_step)["attempts"][-1]
    seconds = parse_time(entry["firstStepTime"]) - since
    screen.tell(
        f"  resumed as attempt {entry['attempt']} from step {entry.get('resumedStep')}: "
        f"{seconds:.1f} s from the failure to the first new step, {entry.get('lostSteps', 0)} steps taken again"
    )


def _table(status: dict[str, Any]) -> str:
    lines = ["", "attempt  resumed  lost  recovery  why it ended"]
    for entry in status.get("attempts", []):
        cause = entry.get("cause")
        why = f"{cause['reason']}: {cause.get('message', '')}" if cause else status["phase"]
        recovery = entry.get("recoverySeconds")
        lines.append(
            f"{entry['attempt']:>7}  {entry.get('resumedStep', 0):>7}  {entry.get('lostSteps', 0):>4}  "
            f"{f'{recovery:.1f} s' if recovery is not None else '-':>8}  {why[:90]}"
        )
    return "\n".join(lines)


def _what_next(env: Environment, args: argparse.Namespace) -> None:
    kubectl = "./dev kubectl" if env.cluster else f"kubectl --kubeconfig {args.kubeconfig}"
    print(
        f"""
What to look at next:
  {kubectl} -n {NAMESPACE} get tr                       the run in one line
  {kubectl} -n {NAMESPACE} describe tr {RUN}            conditions, attempts with causes, Events
  {kubectl} -n {NAMESPACE} logs -l trainyard.dev/run={RUN} --prefix
  {kubectl} explain tr.spec.checkpoint                        every field is described
  examples/digits/train.py                                    the script; it also runs as: ./dev python examples/digits/train.py
  ./dev down                                                  remove all of it"""
        if env.cluster
        else f"""
What to look at next:
  {kubectl} -n {NAMESPACE} describe tr {RUN}
To remove the demo: {kubectl} delete namespace {NAMESPACE} trainyard-system; {kubectl} delete crd trainingruns.trainyard.dev"""
    )


class _Screen:
    """Story lines, and one line of progress that is redrawn on a terminal (one every 5 s elsewhere)."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._shown = ""
        self._last = 0.0

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._tty and self._shown:
            sys.stderr.write("\r\033[K")
            self._shown = ""

    def tell(self, text: str) -> None:
        self._clear()
        say(text)

    def progress(self, status: dict[str, Any], why: str) -> None:
        step, total = status.get("step"), status.get("totalSteps")
        nodes = status.get("nodes", {}).get("summary", "-")
        line = f"{status.get('phase') or 'Pending':<10} nodes {nodes} attempt {status.get('attempt', 0)}"
        if step is not None and total:
            filled = 30 * step // total
            line += f" [{'#' * filled}{'.' * (30 - filled)}] step {step}/{total}"
            if status.get("loss") is not None:
                line += f" loss {status['loss']:.3f}"
        elif why:
            line += f" {why[:80]}"
        if self._tty:
            sys.stderr.write(f"\r\033[K{line[:150]}")
            sys.stderr.flush()
            self._shown = line
        elif time.monotonic() - self._last > 5 and line != self._shown:
            self._last, self._shown = time.monotonic(), line
            say(line)


__all__ = ["DevclusterError", "main", "story"]
