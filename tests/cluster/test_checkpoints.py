"""Checkpoints on real nodes: what is read on a restart, what is kept, and what goes with the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from devcluster.errors import DevclusterError
from devcluster.scenario import Scenario
from tests.cluster.bucket import AccessLog, Bucket
from tests.cluster.runs import ARGS, at_step, complete, final_sha

SLOW = [*ARGS, "--batch-size", "64", "--step-delay", "0.2"]
"""Slow enough to act between two checkpoints. The last of two equal options counts."""
ONE_SAVE = 20
"""Steps to the checkpoint that these tests resume from; the next one is as far away."""
BOUND = 90.0
"""Seconds; no test asserts a time, this ends a wait that has no end."""


def submit(scenario: Scenario, name: str, checkpoint: dict[str, Any], **spec: Any) -> Bucket:
    """A run with these fields of spec.checkpoint beside those that every run here has; None removes one."""
    made = scenario.spec(**spec)
    merged = made["checkpoint"] | checkpoint
    made["checkpoint"] = {k: v for k, v in merged.items() if v is not None}
    scenario.submit(name, made)
    return Bucket(scenario, scenario.run(name)["metadata"]["uid"])


def until(what: str, check: Callable[[], Any], seconds: float = BOUND) -> Any:
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.3)
    return found


def committed(scenario: Scenario, name: str, step: int) -> dict[str, Any]:
    """The status once a checkpoint of `step` or later is committed."""
    return scenario.wait(
        name,
        f"a checkpoint of step {step}",
        lambda s: (s.get("checkpoint") or {}).get("step", 0) >= step,
        seconds=120,
    )


def trains_again(scenario: Scenario, name: str, attempt: int) -> dict[str, Any]:
    return scenario.wait(
        name,
        f"attempt {attempt} to train",
        lambda s: s["attempt"] >= attempt and bool(s["attempts"][-1].get("firstStepTime")),
        seconds=120,
    )


def gone(scenario: Scenario, name: str) -> None:
    def is_gone() -> bool:
        return not scenario.kubectl("-n", scenario.namespace, "get", "tr", name, "--ignore-not-found").strip()

    try:
        until(f"run {name} to be gone", is_gone, seconds=180)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{scenario.explain(name)}") from None


def delete(scenario: Scenario, name: str, *how: str) -> None:
    scenario.kubectl("-n", scenario.namespace, "delete", "tr", name, "--wait=false", *how)


# ---- deletionPolicy ---------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_a_run_that_is_deleted_takes_its_checkpoints_along(scenario: Scenario) -> None:
    goes = submit(scenario, "goes", {"deletionPolicy": "Delete"}, args=SLOW, processes=1)
    committed(scenario, "goes", 10)
    assert goes.objects()
    delete(scenario, "goes")
    gone(scenario, "goes")
    assert goes.objects() == []
    uploads = goes.client().list_multipart_uploads(Bucket=goes.name, Prefix=goes.prefix)
    assert not uploads.get("Uploads")
    told = {e["reason"]: e for e in scenario.events("goes")}
    assert "CheckpointsDeleted" in told, sorted(told)
    assert "objects" in told["CheckpointsDeleted"]["note"]


@pytest.mark.timeout(400)
def test_a_finished_run_takes_them_along_when_its_time_is_over(scenario: Scenario) -> None:
    args = ["--epochs", "1", "--batch-size", "64"]
    over = submit(
        scenario,
        "over",
        {"deletionPolicy": "Delete"},
        args=args,
        nodes=1,
        processes=1,
        ttlSecondsAfterFinished=5,
    )
    complete(scenario, "over")
    assert over.objects()
    gone(scenario, "over")
    assert over.objects() == []


@pytest.mark.timeout(400)
def test_by_default_checkpoints_stay(scenario: Scenario) -> None:
    stays = submit(scenario, "stays", {}, args=SLOW, nodes=1, processes=1)
    committed(scenario, "stays", 10)
    delete(scenario, "stays")
    gone(scenario, "stays")
    assert stays.commits()


@pytest.mark.timeout(400)
def test_what_cannot_be_deleted_is_named_and_the_run_goes(scenario: Scenario) -> None:
    stays = submit(scenario, "stays", {"deletionPolicy": "Delete"}, args=SLOW, nodes=1, processes=1)
    committed(scenario, "stays", 10)
    scenario.kubectl(
        "-n", scenario.namespace, "patch", "secret", "s3-credentials", "--type=merge",
        "-p", '{"stringData": {"AWS_SECRET_ACCESS_KEY": "wrong"}}',
    )  # fmt: skip
    delete(scenario, "stays")
    gone(scenario, "stays")
    told = {e["reason"]: e for e in scenario.events("stays")}
    assert "CheckpointsLeftBehind" in told, sorted(told)
    note = told["CheckpointsLeftBehind"]["note"]
    assert stays.uid in note and "credentials" in note and told["CheckpointsLeftBehind"]["type"] == "Warning"
    assert stays.commits()


# ---- the local tier ---------------------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_a_restart_in_place_reads_nothing_from_the_bucket(scenario: Scenario) -> None:
    bucket = submit(scenario, "local", {"interval": {"steps": ONE_SAVE}}, args=SLOW, processes=1)
    saved = committed(scenario, "local", ONE_SAVE)["checkpoint"]["step"]
    log = AccessLog(scenario)
    scenario.kill_rank("local", 1, per_node=1)
    status = trains_again(scenario, "local", 2)
    reads = log.reads(bucket)
    assert status["attempts"][-1]["resumedStep"] == saved
    assert status["attempts"][-1]["podsCreated"] == 0
    assert reads == []
    assert "PutObject" in {operation for operation, _ in log.requests(bucket)}, (
        "the fence: the log sees this run"
    )
    complete(scenario, "local")
    final_sha(scenario, "local")


@pytest.mark.timeout(400)
def test_without_the_local_tier_a_restart_reads_the_bucket(scenario: Scenario) -> None:
    """The other side of the test above: reads are seen where there are any."""
    checkpoint = {"interval": {"steps": ONE_SAVE}, "local": {"enabled": False}}
    bucket = submit(scenario, "remote", checkpoint, args=SLOW, processes=1)
    committed(scenario, "remote", ONE_SAVE)
    log = AccessLog(scenario)
    scenario.kill_rank("remote", 1, per_node=1)
    trains_again(scenario, "remote", 2)
    assert [url for operation, url in log.reads(bucket) if operation == "GetObject" and "/data/" in url]


@pytest.mark.timeout(400)
def test_a_replaced_pod_resumes_from_its_neighbours_copy(scenario: Scenario) -> None:
    checkpoint = {"interval": {"steps": ONE_SAVE}, "local": {"copies": 1}}
    bucket = submit(scenario, "copies", checkpoint, args=SLOW, processes=1)
    saved = committed(scenario, "copies", ONE_SAVE)["checkpoint"]["step"]
    for index, neighbour in ((0, 1), (1, 0)):
        until(
            f"node {neighbour}'s shard on node {index}",
            lambda i=index, n=neighbour: _has_copy(scenario, "copies", i, n, saved),
        )
    before = scenario.pods("copies")
    log = AccessLog(scenario)
    scenario.delete_pod("copies", 1, force=True)
    status = trains_again(scenario, "copies", 2)
    after = scenario.pods("copies")
    assert after[0]["uid"] == before[0]["uid"] and after[1]["uid"] != before[1]["uid"]
    assert status["attempts"][-1]["resumedStep"] == saved
    assert [url for operation, url in log.reads(bucket) if "/data/" in url] == []
    complete(scenario, "copies")
    final_sha(scenario, "copies")


def _has_copy(scenario: Scenario, name: str, index: int, of_rank: int, step: int) -> bool:
    pod = scenario.pods(name)[index]["name"]
    shard = f"*/step-{step:012d}/*/shard-{of_rank:05d}-of-*.safetensors"
    try:
        found = scenario.kubectl(
            "-n", scenario.namespace, "exec", pod, "-c", "trainer", "--",
            "find", "/trainyard/staging/copies", "-path", shard,
        )  # fmt: skip
    except DevclusterError:  # no such folder yet
        return False
    return bool(found.strip())


# ---- when to save, what to keep, where to start from --------------------------------------------------


@pytest.mark.timeout(400)
def test_the_automatic_interval_commits(scenario: Scenario) -> None:
    submit(scenario, "auto", {"interval": {"auto": True}}, args=SLOW, nodes=1, processes=1)
    status = scenario.wait("auto", "a checkpoint", lambda s: bool(s.get("checkpoint")), seconds=120)
    saved = status["checkpoint"]
    assert saved["reason"] == "auto", saved
    assert saved["bytes"] > 1000 and saved["uploadSeconds"] > 0 and saved["stallSeconds"] > 0, saved


@pytest.mark.timeout(400)
def test_the_best_checkpoint_is_kept_beside_the_newest(scenario: Scenario) -> None:
    """The loss falls, so the worst of it is at the beginning: with mode max an early one is the best."""
    checkpoint = {"interval": None, "keep": 2, "keepBest": {"metric": "val_loss", "mode": "max"}}
    args = ["--epochs", "8", "--batch-size", "64"]
    bucket = submit(scenario, "best", checkpoint, args=args, nodes=1, processes=1)
    last = complete(scenario, "best")["step"]
    commits = until("the others to be pruned", lambda: c if len(c := bucket.commits()) == 3 else None)
    best, *newest = commits
    losses = [c["metrics"]["val_loss"] for c in commits]
    assert losses[0] == max(losses) and best["step"] <= last // 2, [
        (c["step"], c["metrics"]) for c in commits
    ]
    assert newest[-1]["step"] == last
    kept = {shard["key"] for c in commits for shard in c["shards"]}
    assert {k for k in bucket.objects() if k.endswith(".safetensors")} == kept


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("resume", "words"), [("required", "required"), (120, "120")], ids=str)
def test_a_run_that_must_resume_and_cannot_fails_and_says_so(
    scenario: Scenario, resume: int | str, words: str
) -> None:
    submit(scenario, "must", {"resume": resume}, args=ARGS, nodes=1, processes=1)
    end = time.monotonic() + BOUND
    while (status := scenario.status("must")).get("phase") != "Failed":
        assert time.monotonic() < end, scenario.explain("must")
        time.sleep(0.3)
    failed = scenario.condition(status, "Failed")
    assert failed["reason"] == "ConfigurationError", failed
    assert "resume" in failed["message"] and words in failed["message"], failed
    assert status["attempt"] == 1, "a restart cannot help"


@pytest.mark.timeout(400)
def test_never_starts_anew_and_goes_on_from_there(scenario: Scenario) -> None:
    """A restart does not begin again: the policy was followed once."""
    submit(
        scenario,
        "anew",
        {"resume": "never", "interval": {"steps": ONE_SAVE}},
        args=SLOW,
        nodes=1,
        processes=1,
    )
    saved = committed(scenario, "anew", ONE_SAVE)["checkpoint"]["step"]
    scenario.kill_rank("anew", 0, per_node=1)
    status = trains_again(scenario, "anew", 2)
    assert status["attempts"][-1]["resumedStep"] == saved
    at_step(scenario, "anew", saved + 1)
