"""OCI layouts: what is written is what the development cluster's nodes read, and blobs are on the disk once."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path

import pytest

from devcluster.cluster.images import read_image
from devcluster.errors import DevclusterError
from devcluster.images import base, build, files, inputs, layout

LAYER = b"the bytes of a layer" * 100


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_CACHE", str(tmp_path))
    return tmp_path


def compressed_image(folder: Path, *, diff_id: str) -> dict[str, object]:
    """A layout as buildah writes it: a compressed layer, and its uncompressed digest in the configuration."""
    layer = layout.put_stream(io.BytesIO(gzip.compress(LAYER)))
    config = layout.put_json({"rootfs": {"type": "layers", "diff_ids": [diff_id]}}, layout.CONFIG)
    layers = [{"mediaType": f"{layout.LAYER}+gzip", **layer}]
    manifest = layout.put_json({"schemaVersion": 2, "config": config, "layers": layers}, layout.MANIFEST)
    layout.link_pool(folder)
    return manifest


def test_a_node_finds_an_image_by_its_name(tmp_path: Path) -> None:
    layer = layout.put_stream(io.BytesIO(LAYER))
    digest = layout.write_single_layer(tmp_path / "image", layer, tag="localhost/trainyard/x:1", config={})
    image = read_image(tmp_path / "image", "localhost/trainyard/x:1")
    assert image.digest == digest
    for each in image.blobs:
        assert each == f"sha256:{hashlib.sha256(image.blob(each).read_bytes()).hexdigest()}"
    assert LAYER in {image.blob(each).read_bytes() for each in image.blobs}


def test_layouts_share_blobs_with_the_pool(tmp_path: Path) -> None:
    layer = layout.put_stream(io.BytesIO(LAYER))
    for name in ("one", "two"):
        layout.write_single_layer(tmp_path / name, layer, tag=name, config={"Cmd": [name]})
    inodes = {layout.blob(tmp_path / name, layer["digest"]).stat().st_ino for name in ("one", "two")}
    assert inodes == {layout.pooled(layer["digest"]).stat().st_ino}
    # Of the first image's own blobs none is in the second's layout.
    assert len(list((tmp_path / "two" / "blobs" / "sha256").iterdir())) == 3


def test_compressed_layers_become_plain_and_the_digest_depends_on_contents_alone(tmp_path: Path) -> None:
    plain = f"sha256:{hashlib.sha256(LAYER).hexdigest()}"
    folder = tmp_path / "image"
    described = layout.uncompress(folder, compressed_image(folder, diff_id=plain))
    layout.finish(folder, described, ["name:tag"])
    image = read_image(folder, "name:tag")
    content = json.loads(image.blob(image.digest).read_bytes())
    assert content["layers"] == [{"mediaType": layout.LAYER, "digest": plain, "size": len(LAYER)}]
    assert image.blob(plain).read_bytes() == LAYER
    assert len(list((folder / "blobs" / "sha256").iterdir())) == 3
    assert files.blobs().joinpath(plain.removeprefix("sha256:")).exists()


def test_a_layer_that_is_not_what_the_configuration_says_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "image"
    manifest = compressed_image(folder, diff_id="sha256:" + "0" * 64)
    with pytest.raises(DevclusterError, match="which it calls sha256:000"):
        layout.uncompress(folder, manifest)


def test_what_an_interrupted_holder_left_is_removed_by_the_next(cache: Path) -> None:
    left = cache / "images" / "unfinished" / "killed" / "root"
    left.mkdir(parents=True)
    with files.exclusive("a test"), files.workspace() as work:
        assert not left.exists()
        assert work.is_dir()
    assert not work.exists()


def test_an_empty_cache_holds_no_image() -> None:
    assert [build.find(target) for target in inputs.TARGETS] == [None, None]
    assert build.images() == []
    assert base.find("torch") is None


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="operator, trainer"):
        build.build("worker")
    with pytest.raises(ValueError, match="python, torch"):
        base.ensure("alpine")


def test_an_image_in_the_cache_is_found_again_under_the_key_of_the_checkout(tmp_path: Path) -> None:
    layer = layout.put_stream(io.BytesIO(LAYER))
    folder = files.bases() / f"python-{base.key('python')}"
    digest = layout.write_single_layer(folder, layer, tag="python", config={})
    (folder / "base.json").write_text(json.dumps({"digest": digest, "python": "3.14"}))
    found = base.find("python")
    assert found is not None and found.ref == f"localhost/trainyard/base-python:{digest[7:19]}"
    tag = inputs.key(files.REPOSITORY, inputs.TARGETS["operator"], digest, str(build._FORMAT))
    layout.write_single_layer(
        files.layouts() / f"operator-{tag}", layer, tag=f"localhost/trainyard/operator:{tag}", config={}
    )
    image = build.build("operator")
    assert image.ref == f"localhost/trainyard/operator:{tag}"
    assert read_image(image.oci_layout, image.ref).digest == image.digest
    assert build.images() == [image]
