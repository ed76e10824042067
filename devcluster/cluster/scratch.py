"""OCI images of a few files, made without any tool: the pause image, and what tests need."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# A path in the image, to a program's bytes or (as text) to where a symbolic link points.
Files = Mapping[str, bytes | str]


def blob_path(layout: Path, digest: str) -> Path:
    """Where an OCI layout keeps a blob."""
    return layout / "blobs" / digest.replace(":", "/")


def make_layout(folder: Path, layers: Sequence[Files], entrypoint: Sequence[str], user: str = "") -> Path:
    """Write an OCI layout with one image, of one layer for each mapping. The same input gives the same digests."""
    listed = [_put(folder, _tar(files), _LAYER) for files in layers]
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "User": user, "Env": ["PATH=/bin"]},
        # Layers are not compressed, so that their digests are those of their contents.
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in listed]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _put(folder, json.dumps(config).encode(), _CONFIG),
        "layers": listed,
    }
    entry = _put(folder, json.dumps(manifest).encode(), _MANIFEST)
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return folder


def pause(folder: Path, program: Path) -> Path:
    """The image of a pod's sandbox: the pause program and nothing else."""
    return make_layout(folder, [{"pause": program.read_bytes()}], ["/pause"], user="65535:65535")


def _tar(files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode = 0o755
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def _put(folder: Path, data: bytes, kind: str) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    path = blob_path(folder, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(data)
    return {"mediaType": kind, "digest": digest, "size": len(data)}
