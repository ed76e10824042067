"""The cluster level: real kubelets and containers, the operator as a Deployment, a real S3 server.

One embedded cluster for the whole level (name "test"), or the cluster of `./dev test --kubeconfig`. It is taken
down at the end, also after a failure or Ctrl-C, and nothing of it may be left then.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.environment import Environment, embedded, existing
from devcluster.scenario import Scenario

CLUSTER = "test"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def env() -> Iterator[Environment]:
    given = os.environ.get("TRAINYARD_TEST_KUBECONFIG")
    if given:
        yield existing(
            argparse.Namespace(
                kubeconfig=Path(given),
                operator_image=os.environ.get("TRAINYARD_TEST_OPERATOR_IMAGE"),
                trainer_image=os.environ.get("TRAINYARD_TEST_TRAINER_IMAGE"),
                s3_uri=os.environ.get("TRAINYARD_TEST_S3_URI"),
                s3_endpoint=os.environ.get("TRAINYARD_TEST_S3_ENDPOINT"),
            )
        )
        return
    if os.geteuid() != 0:
        pytest.skip("the embedded cluster needs root; or name a cluster with ./dev test --kubeconfig")
    from devcluster.cluster import Cluster, leftovers

    try:
        yield embedded(CLUSTER, nodes=2)
    finally:
        Cluster(CLUSTER).down()
    assert leftovers() == [], "the cluster level left something behind"


@pytest.fixture
def scenario(env: Environment, request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """A namespace of this test's own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:30]
    made = Scenario(env, f"t{next(_numbers)}-{name}".rstrip("-"))
    try:
        yield made.__enter__()
    finally:
        made.close(wait=False)  # nobody needs the name again; the cluster's end removes what is left


@pytest.fixture(scope="module")
def module_scenario(env: Environment, request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """A namespace for a whole file."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(str(request.fspath)).stem.removeprefix("test_").lower())
    with Scenario(env, f"m{next(_numbers)}-{name}") as made:
        yield made
