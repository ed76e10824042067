"""OCI image layouts: folders that hold an image as blobs and an index.

Implements `image-layout.md`, `manifest.md` and `config.md` of opencontainers/image-spec 1.0.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from devcluster.errors import DevclusterError
from devcluster.images import files

REF_NAME = "org.opencontainers.image.ref.name"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
_EPOCH = "1970-01-01T00:00:00Z"


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRef:
    """One image, built and lying in an OCI layout of its own."""

    name: str
    """Repository. It begins with `localhost/`: no node can mistake it for one that could be pulled."""
    tag: str
    digest: str
    """Of the manifest: sha256:..."""
    oci_layout: Path

    @property
    def ref(self) -> str:
        """What a pod's `image` says."""
        return f"{self.name}:{self.tag}"


def architecture() -> str:
    """This machine's architecture as OCI spells it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def pooled(digest: str) -> Path:
    """A blob in the pool which the layouts share."""
    return files.blobs() / digest.removeprefix("sha256:")


def put_stream(stream: IO[bytes] | gzip.GzipFile) -> dict[str, Any]:
    """Store what the stream yields as a blob of the pool; returns the descriptor without its media type."""
    files.blobs().mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with files.workspace() as folder:
        partial = folder / "blob"
        with partial.open("wb") as file:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += file.write(chunk)
        name = f"sha256:{digest.hexdigest()}"
        partial.replace(pooled(name))
    return {"digest": name, "size": size}


def put_json(value: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    """Store a JSON document as a blob of the pool."""
    data = json.dumps(value, sort_keys=True).encode()
    name = f"sha256:{hashlib.sha256(data).hexdigest()}"
    files.blobs().mkdir(parents=True, exist_ok=True)
    pooled(name).write_bytes(data)
    return {"mediaType": media_type, "digest": name, "size": len(data)}


def write_single_layer(folder: Path, layer: Mapping[str, Any], *, tag: str, config: Mapping[str, Any]) -> str:
    """Make a layout of one image whose one layer is in the pool; returns the manifest's digest."""
    described = put_json(
        {
            "architecture": architecture(),
            "os": "linux",
            "created": _EPOCH,
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            "history": [{"created": _EPOCH, "created_by": "devcluster.images"}],
        },
        CONFIG,
    )
    manifest = put_json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": described,
            "layers": [{"mediaType": LAYER, **layer}],
        },
        MANIFEST,
    )
    link_pool(folder)
    finish(folder, manifest, [tag])
    return str(manifest["digest"])


def link_pool(folder: Path) -> None:
    """Give a layout every blob there is, so that what writes an image into it writes only what is new."""
    target = folder / "blobs" / "sha256"
    target.mkdir(parents=True, exist_ok=True)
    for path in files.blobs().glob("*"):
        os.link(path, target / path.name)


def uncompress(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Store an image's compressed layers as they are uncompressed; returns the changed manifest's descriptor.

    buildah compresses whatever it writes into an OCI layout, but takes a layer for present whose uncompressed
    form lies there. So each layer is compressed and uncompressed once in its life, nodes never have to, and the
    manifest's digest is decided by the layers' contents alone.
    """
    content = json.loads(blob(folder, manifest["digest"]).read_bytes())
    plain = json.loads(blob(folder, content["config"]["digest"]).read_bytes())["rootfs"]["diff_ids"]
    for layer, diff_id in zip(content["layers"], plain, strict=True):
        if layer["digest"] == diff_id:
            continue
        with gzip.open(blob(folder, layer["digest"])) as stream:
            layer.update(put_stream(stream), mediaType=LAYER)
        if layer["digest"] != diff_id:
            raise DevclusterError(f"buildah wrote a layer {layer['digest']} which it calls {diff_id}")
    described = put_json(content, MANIFEST)
    for digest in {described["digest"], *plain}:
        if not blob(folder, digest).exists():
            os.link(pooled(digest), blob(folder, digest))
    return described


def finish(folder: Path, manifest: Mapping[str, Any], names: list[str]) -> None:
    """Reduce a layout to one image under these names, and put its new blobs into the pool."""
    descriptor = {key: manifest[key] for key in ("mediaType", "digest", "size")}
    content = json.loads(blob(folder, descriptor["digest"]).read_bytes())
    needed = {
        descriptor["digest"],
        content["config"]["digest"],
        *(layer["digest"] for layer in content["layers"]),
    }
    for path in (folder / "blobs" / "sha256").iterdir():
        if f"sha256:{path.name}" not in needed:
            path.unlink()
        elif not (shared := files.blobs() / path.name).exists():
            os.link(path, shared)
    entries = [{**descriptor, "annotations": {REF_NAME: name}} for name in names]
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def manifests(folder: Path) -> list[dict[str, Any]]:
    """The index's entries."""
    entries: list[dict[str, Any]] = json.loads((folder / "index.json").read_text())["manifests"]
    return entries


def config_digest(folder: Path, manifest_digest: str) -> str:
    """The digest of an image's configuration, which is what buildah calls the image's id."""
    return str(json.loads(blob(folder, manifest_digest).read_bytes())["config"]["digest"])


def size(folder: Path) -> int:
    """Bytes of a layout's blobs, shared ones included."""
    return sum(path.stat().st_size for path in (folder / "blobs" / "sha256").iterdir())
