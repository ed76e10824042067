"""A control plane without nodes: quick, for anybody, and gone with whoever started it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.cluster import ControlPlane
from devcluster.proc import start_time
from devcluster.s3 import S3Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("control-plane")
    with ControlPlane(folder) as made:
        yield made
    assert not list(folder.iterdir())


def test_version_is_that_of_the_pins(control_plane: ControlPlane) -> None:
    version = json.loads(control_plane.kubectl("version", "-o", "json"))
    assert version["serverVersion"]["gitVersion"] == version["clientVersion"]["gitVersion"] == "v1.35.4"


def test_controllers_run(control_plane: ControlPlane) -> None:
    """Garbage collection: what is owned goes with its owner."""
    control_plane.kubectl("create", "configmap", "owner")
    uid = control_plane.kubectl("get", "configmap", "owner", "-o", "jsonpath={.metadata.uid}")
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}
    owned = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "owned", "ownerReferences": [owner]},
    }
    control_plane.kubectl("create", "-f", "-", text=json.dumps(owned))
    control_plane.kubectl("delete", "configmap", "owner")
    control_plane.kubectl("wait", "--for=delete", "configmap/owned", "--timeout=30s")


def test_writes_are_audited(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "configmap", "audited")
    lines = [json.loads(line) for line in control_plane.audit_log.read_text().splitlines()]
    (found,) = [line for line in lines if (line.get("objectRef") or {}).get("name") == "audited"]
    assert (found["verb"], found["user"]["username"], found["level"]) == ("create", "admin", "Metadata")


def test_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from devcluster.cluster import ControlPlane;"
        f"plane = ControlPlane(Path({str(tmp_path)!r})); plane.start();"
        "names = ('etcd', 'kube-apiserver', 'kube-controller-manager');"
        "print(*[plane.process(name).pid for name in names], flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(start_time(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(start_time(pid) for pid in pids)


def test_s3_server(tmp_path: Path) -> None:
    with S3Server(tmp_path / "data") as server:
        server.make_bucket("bucket")
        server.make_bucket("bucket")
        assert (tmp_path / "data" / "bucket").is_dir()
        assert server.access.request("GET", "/bucket", signed=False)[0] == 403
        assert server.access.request("GET", "/bucket")[0] == 200
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_s3_honours_conditional_writes(tmp_path: Path) -> None:
    boto3 = pytest.importorskip("boto3")
    with S3Server(tmp_path / "data") as server:
        server.make_bucket("bucket")
        keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
        client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)
        client.put_object(Bucket="bucket", Key="manifest", Body=b"1", IfNoneMatch="*")
        with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="bucket", Key="manifest", Body=b"2", IfNoneMatch="*")
