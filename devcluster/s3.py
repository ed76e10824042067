"""A real S3 server: versitygw, serving a folder.

It honours the conditional writes on which checkpoints rely. It keeps metadata in extended attributes, so the folder
must be on a file system that has those (ext4, xfs, btrfs; tmpfs since Linux 6.6).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import http.client
import os
from pathlib import Path
from types import TracebackType

from devcluster.errors import DevclusterError
from devcluster.gotools import build
from devcluster.ports import free_ports
from devcluster.proc import Process
from devcluster.progress import wait_for

REGION = "us-east-1"
_HEALTH = "/_trainyard_health"


@dataclasses.dataclass(frozen=True, slots=True)
class S3Access:
    """How to reach an S3 server."""

    host: str
    port: int
    access_key: str
    secret_key: str

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 and the AWS command line read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket unless it is there."""
        status, answer = self.request("PUT", f"/{name}")
        if status != 200 and not (status == 409 and "BucketAlready" in answer):
            raise DevclusterError(f"making bucket {name!r} failed: {status} {answer}")

    def await_health(self, process: Process) -> None:
        """Wait until the server, which runs as this process, answers."""
        wait_for(
            "waiting for the S3 server",
            lambda: self.request("GET", _HEALTH, signed=False)[0] == 200,
            seconds=20,
            alive=lambda: process.running,
            log=process.log,
            every=0.05,
        )

    def request(self, method: str, path: str, *, signed: bool = True) -> tuple[int, str]:
        """One request without a body: status and answer; status 0 when there is no server."""
        headers = sign(self, method, path, datetime.datetime.now(datetime.UTC)) if signed else {}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()


class S3Server:
    """An S3 server; as a context manager it ends with the block, and in any case with the program that started it."""

    def __init__(
        self,
        data_dir: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        access_key: str = "trainyard",
        secret_key: str = "trainyard-secret",  # noqa: S107 - a test server on loopback
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.access = S3Access(host, port or free_ports(1, host)[0], access_key, secret_key)
        # The folder itself is the buckets': what else the server needs lies beside it.
        side = self.data_dir.with_name(f"{self.data_dir.name}.server")
        self.process = Process("s3", side, side / "s3.log")

    @property
    def endpoint(self) -> str:
        return self.access.endpoint

    @property
    def access_key(self) -> str:
        return self.access.access_key

    @property
    def secret_key(self) -> str:
        return self.access.secret_key

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 and the AWS command line read."""
        return self.access.environment

    def make_bucket(self, name: str) -> None:
        """Make a bucket unless it is there."""
        self.access.make_bucket(name)

    def start(self) -> None:
        """Start it, on the port of the last time if there was one, and wait until it answers."""
        check_folder(self.data_dir)
        command = command_line(build.ensure("versitygw")["versitygw"], self.data_dir, self.access)
        self.process.start(command, env=root_keys(self.access), dies_with_parent=True)
        try:
            self.access.await_health(self.process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it; the data stays."""
        self.process.stop()
        self.process.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.process.log.parent.rmdir()

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def command_line(
    binary: Path, data_dir: Path, access: S3Access, access_log: Path | None = None
) -> list[object]:
    """What the server is started with. `access_log` gets a line for each request, in S3's own format."""
    address = f"{access.host}:{access.port}"
    logged: list[object] = [] if access_log is None else ["--access-log", access_log]
    return [
        binary, "--port", address, "--region", REGION, "--health", _HEALTH, "--quiet", *logged, "posix", data_dir,
    ]  # fmt: skip


def root_keys(access: S3Access) -> dict[str, str]:
    """The server's keys, for its environment: a command line is everybody's to read."""
    return {"ROOT_ACCESS_KEY_ID": access.access_key, "ROOT_SECRET_ACCESS_KEY": access.secret_key}


def check_folder(data_dir: Path) -> None:
    """Make the folder, and refuse it when its file system has no extended attributes."""
    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        os.setxattr(data_dir, "user.trainyard", b"1")
        os.removexattr(data_dir, "user.trainyard")
    except OSError as error:
        raise DevclusterError(
            f"{data_dir}: the S3 server needs extended attributes, which this file system refuses: {error}"
        ) from None


def sign(access: S3Access, method: str, path: str, now: datetime.datetime) -> dict[str, str]:
    """AWS Signature Version 4 of a request without query and body."""
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    scope = f"{stamp[:8]}/{REGION}/s3/aws4_request"
    empty = hashlib.sha256(b"").hexdigest()
    signed = {"host": f"{access.host}:{access.port}", "x-amz-content-sha256": empty, "x-amz-date": stamp}
    names = ";".join(signed)
    lines = "".join(f"{key}:{value}\n" for key, value in signed.items())
    canonical = f"{method}\n{path}\n\n{lines}\n{names}\n{empty}"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{access.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    credential = f"Credential={access.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    return {
        "x-amz-content-sha256": empty,
        "x-amz-date": stamp,
        "Authorization": f"AWS4-HMAC-SHA256 {credential}",
    }
