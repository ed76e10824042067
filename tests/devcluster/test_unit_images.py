"""Images: found by name, sent without what a node has already."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from devcluster.cluster.images import read_image, write_tar
from devcluster.cluster.scratch import make_layout
from devcluster.errors import DevclusterError

NAME = "org.opencontainers.image.ref.name"


def archive(layout: Path, digests: list[str]) -> tarfile.TarFile:
    out = io.BytesIO()
    write_tar(read_image(layout, "x:1"), "registry.local/x:1", digests, out)
    out.seek(0)
    return tarfile.open(fileobj=out)


def test_a_change_of_one_layer_leaves_the_other_blob_alone(tmp_path: Path) -> None:
    first = read_image(make_layout(tmp_path, [{"a": b"big"}, {"b": b"1"}], ["/a"]), "x:1")
    second = read_image(make_layout(tmp_path, [{"a": b"big"}, {"b": b"2"}], ["/a"]), "x:1")
    assert len(first.blobs) == len(second.blobs) == 4
    assert len(set(first.blobs) & set(second.blobs)) == 1


def test_layouts_are_reproducible(tmp_path: Path) -> None:
    one, other = (make_layout(tmp_path / name, [{"a": b"1", "l": "a"}], ["/a"]) for name in "ab")
    assert read_image(one, "x:1").digest == read_image(other, "x:1").digest


def test_archive_holds_only_what_was_asked_for(tmp_path: Path) -> None:
    image = read_image(make_layout(tmp_path, [{"a": b"big"}, {"b": b"1"}], ["/a"]), "x:1")
    tar = archive(tmp_path, [image.digest])
    assert tar.getnames() == ["oci-layout", "index.json", "blobs/" + image.digest.replace(":", "/")]
    index = json.loads(tar.extractfile("index.json").read())  # type: ignore[union-attr]
    assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == "registry.local/x:1"


def rename(layout: Path, names: list[str | None]) -> None:
    index = json.loads((layout / "index.json").read_text())
    (entry,) = index["manifests"]
    index["manifests"] = [entry | ({"annotations": {NAME: name}} if name else {}) for name in names]
    (layout / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "names", [[None], ["other"], ["1", "2"], ["r.local/x:1", "2"], ["1", "1"], ["2", "3"]]
)
def test_images_are_found_by_reference_tag_or_being_alone(tmp_path: Path, names: list[str | None]) -> None:
    rename(make_layout(tmp_path, [{"a": b""}], ["/a"]), names)
    assert read_image(tmp_path, "r.local/x:1").blobs


def test_an_image_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    entries = []
    for name in ("2", "3"):
        make_layout(tmp_path, [{name: b""}], ["/a"])
        (entry,) = json.loads((tmp_path / "index.json").read_text())["manifests"]
        entries.append(entry | {"annotations": {NAME: name}})
    (tmp_path / "index.json").write_text(json.dumps({"manifests": entries}))
    assert read_image(tmp_path, "r.local/x:3").digest == entries[1]["digest"]
    with pytest.raises(DevclusterError, match="none of which"):
        read_image(tmp_path, "r.local/x:1")
    with pytest.raises(DevclusterError, match="not an OCI image layout"):
        read_image(tmp_path / "blobs", "x:1")
