"""A real S3 server: versitygw, serving a folder.

It honours the conditional writes on which checkpoints rely. It keeps metadata in extended attributes, so the folder
must be on a file system that has those (ext4, xfs, btrfs; tmpfs since Linux 6.6).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import http.client
import os
from pathlib import Path
from types import TracebackType

from devcluster.errors import DevclusterError
from devcluster.gotools import build
from devcluster.proc import Process
from devcluster.progress import wait_for

REGION = "us-east-1"
_HEALTH = "/_trainyard_health"


class S3Server:
    """An S3 server; as a context manager it ends with the block, and in any case with the program that started it."""

    def __init__(
        self,
        data_dir: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        access_key: str = "trainyard",
        secret_key: str = "trainyard-secret",
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.host = host
        self.port = port
        self.access_key = access_key
        self.secret_key = secret_key
        # The folder itself is the buckets': what else the server needs lies beside it.
        side = self.data_dir.with_name(f"{self.data_dir.name}.server")
        self._process = Process("s3", side, side / "s3.log")

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 and the AWS command line read."""
        return client_environment(self.endpoint, self.access_key, self.secret_key)

    def start(self) -> None:
        """Start it and wait until it answers."""
        from devcluster.cluster.controlplane import free_ports

        check_folder(self.data_dir)
        self.port = self.port or free_ports(1, self.host)[0]
        command = command_line(build.ensure("versitygw")["versitygw"], self.data_dir, self.host, self.port)
        self._process.start(command, env=keys(self.access_key, self.secret_key), dies_with_parent=True)
        await_health(self.host, self.port, self._process)

    def stop(self) -> None:
        """End it; the data stays."""
        self._process.stop()
        self._process.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._process.log.parent.rmdir()

    def make_bucket(self, name: str) -> None:
        """Make a bucket unless it is there."""
        make_bucket(self.host, self.port, name, self.access_key, self.secret_key)

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def client_environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """What boto3 and the AWS command line read."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
    }


def command_line(binary: Path, data_dir: Path, host: str, port: int) -> list[object]:
    return [binary, "--port", f"{host}:{port}", "--region", REGION, "--health", _HEALTH, "--quiet", "posix", data_dir]


def keys(access_key: str, secret_key: str) -> dict[str, str]:
    """The server's root keys, as its environment: a command line is everybody's to read."""
    return {"ROOT_ACCESS_KEY_ID": access_key, "ROOT_SECRET_ACCESS_KEY": secret_key}


def check_folder(data_dir: Path) -> None:
    """Make the folder, and refuse it when its file system has no extended attributes."""
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        os.setxattr(data_dir, "user.trainyard", b"1")
        os.removexattr(data_dir, "user.trainyard")
    except OSError as error:
        raise DevclusterError(f"{data_dir}: the S3 server needs extended attributes, which this file system refuses: {error}") from None


def await_health(host: str, port: int, process: Process) -> None:
    def healthy() -> bool:
        return request(host, port, "GET", _HEALTH)[0] == 200

    wait_for("waiting for the S3 server", healthy, seconds=20, alive=lambda: process.running, log=process.log, every=0.05)


def make_bucket(host: str, port: int, name: str, access_key: str, secret_key: str) -> None:
    status, answer = request(host, port, "PUT", f"/{name}", access_key, secret_key)
    if status != 200 and not (status == 409 and "BucketAlready" in answer):
        raise DevclusterError(f"making bucket {name!r} failed: {status} {answer}")


def request(host: str, port: int, method: str, path: str, access_key: str = "", secret_key: str = "") -> tuple[int, str]:
    """One request without a body; signed when there are keys. Status 0 when there is no server."""
    headers = sign(host, port, method, path, access_key, secret_key) if access_key else {}
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error)
    finally:
        connection.close()


def sign(
    host: str, port: int, method: str, path: str, access_key: str, secret_key: str, now: datetime.datetime | None = None
) -> dict[str, str]:
    """AWS Signature Version 4 of a request without query and body."""
    moment = now or datetime.datetime.now(datetime.UTC)
    stamp = moment.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    empty = hashlib.sha256(b"").hexdigest()
    signed = {"host": f"{host}:{port}", "x-amz-content-sha256": empty, "x-amz-date": stamp}
    names = ";".join(signed)
    lines = "".join(f"{key}:{value}\n" for key, value in signed.items())
    canonical = f"{method}\n{path}\n\n{lines}\n{names}\n{empty}"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    authorization = f"AWS4-HMAC-SHA256 Credential={access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {"x-amz-content-sha256": empty, "x-amz-date": stamp, "Authorization": authorization}
