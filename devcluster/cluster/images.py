"""Bringing container images from an OCI layout folder into a node's image store, moving as little as possible.

Images are built on this machine, and there is no registry. A full image is 1.8 GB, of which a code change touches a few
kilobytes: so the tar that is handed to containerd holds only the blobs which the node lacks. containerd accepts that,
because all it asks is that every blob be in its store when it has read the tar.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

from devcluster.cluster.node import NodeMachine
from devcluster.cluster.scratch import blob_path
from devcluster.errors import DevclusterError
from devcluster.proc import environment

_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
# Unpacking gigabytes on a busy machine is slow, but not this slow.
_IMPORT_SECONDS = 900
_WORTH_ADOPTING = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """One image of an OCI layout folder: its manifest's descriptor and every blob it needs, the manifest's included."""

    layout: Path
    manifest: dict[str, Any]
    blobs: tuple[str, ...]

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    def blob(self, digest: str) -> Path:
        return blob_path(self.layout, digest)


def read_image(layout: Path, ref: str) -> Image:
    """The image in the layout that has this name, or its tag for a name, or is the only one (under however many names)."""
    try:
        manifests = json.loads((layout / "index.json").read_text())["manifests"]
    except (OSError, ValueError, KeyError) as error:
        raise DevclusterError(
            f"{layout} is not an OCI image layout (a folder with index.json and blobs): {error}"
        ) from None
    tag = ref.rpartition("/")[2].partition(":")[2]
    named = [entry for entry in manifests if entry.get("annotations", {}).get(_NAME) in {ref, tag}]
    # An image that is pushed anew is appended: the last one is meant.
    chosen = named or manifests
    if not chosen or (not named and len({entry["digest"] for entry in manifests}) > 1):
        names = [entry.get("annotations", {}).get(_NAME) for entry in manifests]
        raise DevclusterError(f"{layout} holds {names}, none of which is {ref!r} or {tag!r}")
    descriptor = chosen[-1]
    manifest = json.loads(blob_path(layout, descriptor["digest"]).read_bytes())
    if "config" not in manifest:
        raise DevclusterError(f"{ref} in {layout} is an index of several platforms: push one image only")
    digests = [
        descriptor["digest"],
        manifest["config"]["digest"],
        *(layer["digest"] for layer in manifest["layers"]),
    ]
    kept = {key: descriptor[key] for key in ("mediaType", "digest", "size")}
    return Image(layout, kept, tuple(dict.fromkeys(digests)))


def write_tar(image: Image, ref: str, digests: Iterable[str], out: IO[bytes]) -> int:
    """Write an OCI archive which holds these blobs of the image only; returns their bytes."""
    index = {
        "schemaVersion": 2,
        "manifests": [image.manifest | {"annotations": {_FULL_NAME: ref, _NAME: ref}}],
    }
    written = 0
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 20) as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", json.dumps(index).encode())
        for digest in digests:
            path = image.blob(digest)
            entry = tarfile.TarInfo("blobs/" + digest.replace(":", "/"))
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
            written += entry.size
    return written


def load(machine: NodeMachine, image: Image, ref: str) -> int | None:
    """Bring an image to a node; returns the bytes that were copied to it, or None when the node had it."""
    listed = machine.ctr("images", "list", f"name=={ref}").stdout.splitlines()
    if any(line.split()[0] == ref and image.digest in line.split() for line in listed[1:]):
        return None
    present = set(machine.ctr("content", "list", "--quiet").stdout.split())
    lacking = [digest for digest in image.blobs if digest not in present]
    # Always sent, since containerd wants to see a manifest in the archive that it imports.
    if image.digest not in lacking:
        lacking.insert(0, image.digest)
    adopted = [digest for digest in lacking if digest != image.digest and _adopt(machine, image, digest)]
    sent = [digest for digest in lacking if digest not in adopted]
    try:
        return _import(machine, image, ref, sent)
    except DevclusterError:
        if not adopted:
            raise
        # Nothing refers to an adopted blob before the import: containerd may have cleaned it up.
        return _import(machine, image, ref, lacking)


def _adopt(machine: NodeMachine, image: Image, digest: str) -> bool:
    """Have the node's containerd take over a large blob as a hard link, so that a gigabyte need not be copied to it.

    When a blob lies in containerd's folder already and its digest is announced, containerd merely notes that it is
    there. What its layers hold is still checked by the unpacking. Without a common disk it is an ordinary copy.
    """
    blob = image.blob(digest)
    if blob.stat().st_size < _WORTH_ADOPTING:
        return False
    folder = machine.node.images / "io.containerd.content.v1.content" / "blobs" / "sha256"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / digest.removeprefix("sha256:")).hardlink_to(blob)
    expected = [f"--expected-digest={digest}", f"--expected-size={blob.stat().st_size}"]
    with blob.open("rb") as file:
        command = machine.ctr_command("content", "ingest", *expected, f"adopt-{digest}")
        done = subprocess.run(
            command, stdin=file, capture_output=True, env=environment(), timeout=_IMPORT_SECONDS, check=False
        )
    return done.returncode == 0


def _import(machine: NodeMachine, image: Image, ref: str, digests: list[str]) -> int:
    sent = 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            machine.ctr_command("images", "import", "-"),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env=environment(),
        )
        timer = threading.Timer(_IMPORT_SECONDS, process.kill)
        timer.start()
        try:
            # A ctr that fails closes its end; what it said is of more use than that.
            with contextlib.suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:
                sent = write_tar(image, ref, digests, stdin)
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if code != 0:
            said.seek(0)
            text = said.read().decode(errors="replace")[-1000:]
            raise DevclusterError(
                f"{machine.node.name} did not take image {ref}: ctr exited with {code}: {text}"
            )
    return sent


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
