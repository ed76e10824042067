"""Objects that somebody altered: the run goes on from the checkpoint before, exactly, and says so."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import pytest

from devcluster.scenario import Scenario
from tests.cluster.bucket import s3_client
from tests.cluster.runs import ARGS, at_step, complete, final_sha


@pytest.mark.timeout(300)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_says_so(scenario: Scenario) -> None:
    scenario.submit("hurt", scenario.spec(args=ARGS))
    at_step(scenario, "hurt", 35)
    scenario.patch("hurt", {"spec": {"suspend": True}})
    scenario.wait("hurt", "Suspended", lambda s: s.get("phase") == "Suspended", seconds=60)

    uri = urlsplit(scenario.spec()["checkpoint"]["uri"])
    prefix = f"{uri.path.strip('/')}/{scenario.run('hurt')['metadata']['uid']}/"
    client = s3_client(scenario)
    listed = client.list_objects_v2(Bucket=uri.netloc, Prefix=f"{prefix}commits/")["Contents"]
    records = [json.loads(client.get_object(Bucket=uri.netloc, Key=o["Key"])["Body"].read()) for o in listed]
    commits = sorted((r for r in records if r["kind"] == "commit"), key=lambda r: r["seq"])
    newest, before = commits[-1], commits[-2]
    key = prefix + newest["shards"][0]["key"]
    whole = client.get_object(Bucket=uri.netloc, Key=key)["Body"].read()
    middle = len(whole) // 2
    client.put_object(
        Bucket=uri.netloc, Key=key, Body=whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )

    scenario.patch("hurt", {"spec": {"suspend": False}})
    status = complete(scenario, "hurt")
    entry = status["attempts"][-1]
    assert entry["resumedStep"] == before["step"] < newest["step"]
    assert "SHA-256" in entry["passedOver"] or "sha256" in entry["passedOver"], entry
    told = [e for e in scenario.events("hurt") if e["reason"] == "CheckpointPassedOver"]
    assert len(told) == 1 and told[0]["type"] == "Warning"
    final_sha(scenario, "hurt")
