"""Single checkpoint files: written whole or not at all, and read with suspicion."""

from __future__ import annotations

import errno
import http.server
import io
import os
import random
import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from devcluster.s3 import S3Server
from trainyard.checkpoint.errors import CheckpointError, StoreConfigError
from trainyard.errors import MisconfigurationException
from trainyard.loops.state import LoopState
from trainyard.trainer import ckpt_file, ckpt_layout
from trainyard.trainer.ckpt_errors import CheckpointFileDamaged, CheckpointFileNotFound, UnsafeCheckpoint

CHECKPOINT: dict[str, Any] = {
    "state_dict": {"w": torch.arange(3000.0), "b": torch.ones(2, dtype=torch.bfloat16)},
    "epoch": 3,
    "x": [None, "a"],
}


def same(found: dict[str, Any]) -> bool:
    return repr(found) == repr(CHECKPOINT) and all(
        torch.equal(found["state_dict"][k], v) for k, v in CHECKPOINT["state_dict"].items()
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a b.ckpt"
    ckpt_file.write(CHECKPOINT, path)
    for place in (path, str(path), path.as_uri(), io.BytesIO(path.read_bytes())):
        assert same(ckpt_file.read(place))
    assert names(path.parent) == ["a b.ckpt"]
    assert ckpt_file.exists(path)
    ckpt_file.remove(path)
    ckpt_file.remove(path.as_uri())
    assert not ckpt_file.exists(path)


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "last.ckpt").symlink_to("old")
    ckpt_file.write(CHECKPOINT, tmp_path / "last.ckpt")
    assert same(ckpt_file.read(tmp_path / "last.ckpt"))
    assert (tmp_path / "old").read_text() == "old"


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    """With a limit on the size of files in place of the disk: the same call fails."""
    path = tmp_path / "m.ckpt"
    path.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as info:
            ckpt_file.write(CHECKPOINT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert info.value.errno == errno.EFBIG
    assert path.read_text() == "before"
    assert names(tmp_path) == ["m.ckpt"]


def test_what_cannot_be_pickled_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    path.write_text("before")
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        ckpt_file.write({"state_dict": {}, "f": threading.Lock()}, path)
    assert (path.read_text(), names(tmp_path)) == ("before", ["m.ckpt"])


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "epoch=3-step=20.ckpt").touch()
    with pytest.raises(
        CheckpointFileNotFound, match=re.escape("does not exist; its folder has epoch=3-step=20.ckpt")
    ):
        ckpt_file.read(tmp_path / "epoch=3.ckpt")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ckpt_file.read(tmp_path / "none" / "epoch=3.ckpt")
    with pytest.raises(CheckpointFileDamaged, match="is a directory"):
        ckpt_file.read(tmp_path)
    with pytest.raises(IsADirectoryError, match="needs the name of a file"):
        ckpt_file.write(CHECKPOINT, tmp_path)
    with pytest.raises(MisconfigurationException, match="not at gs://"):
        ckpt_file.read("gs://bucket/m.ckpt")
    with pytest.raises(MisconfigurationException, match="is a local path, which takes none"):
        ckpt_file.write(CHECKPOINT, tmp_path / "m.ckpt", {"a": 1})


# ---- damage


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.ckpt").write_bytes(content)
    with pytest.raises(CheckpointFileDamaged, match=rf"m\.ckpt .*({len(content)} bytes|holds a list)"):
        ckpt_file.read(tmp_path / "m.ckpt")


def test_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    ckpt_file.write(CHECKPOINT, path)
    whole = path.read_bytes()
    for size in [*random.Random(1).sample(range(len(whole)), 25), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointFileDamaged):
            ckpt_file.read(path)


def test_no_flipped_bit_gets_into_the_weights(tmp_path: Path) -> None:
    """torch.load itself does not look at the checksums. Most bits of so small a file are padding."""
    path = tmp_path / "m.ckpt"
    ckpt_file.write(CHECKPOINT, path)
    whole = path.read_bytes()
    dice, refused = random.Random(2), 0
    for _ in range(150):
        broken = bytearray(whole)
        broken[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        path.write_bytes(broken)
        try:
            assert same(ckpt_file.read(path))
        except CheckpointFileDamaged:
            refused += 1
    assert refused > 75


def test_a_file_without_checksums_is_taken_as_it_is(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CHECKPOINT, tmp_path / "m.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(ckpt_file.read(tmp_path / "m.ckpt"))


# ---- what must not run


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_run(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "m.ckpt", tmp_path / "was here"
    torch.save({"hyper_parameters": {"a": Evil(trace)}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UnsafeCheckpoint, match=r"holds posix\.mkdir, and to load these would run code of theirs"
    ):
        ckpt_file.read(path)
    assert not trace.exists()
    ckpt_file.read(path, weights_only=False)
    assert trace.exists(), "only the user's word does it"


# ---- elsewhere


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_from_a_web_server(site: str, tmp_path: Path) -> None:
    ckpt_file.write(CHECKPOINT, tmp_path / "m.ckpt")
    assert same(ckpt_file.read(f"{site}/m.ckpt"))
    with pytest.raises(CheckpointFileNotFound, match="the server says 404"):
        ckpt_file.read(f"{site}/none.ckpt")
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        ckpt_file.read("http://127.0.0.1:9/m.ckpt")


def test_in_a_bucket(s3: S3Server, s3_credentials: None, prefix: str) -> None:
    for place in (f"{prefix}/deep/m.ckpt", f"s3://{prefix.split('/')[2]}/{prefix.split('/')[3]}.ckpt"):
        ckpt_file.write(CHECKPOINT, place)
        assert ckpt_file.exists(place)
        assert same(ckpt_file.read(place))
        ckpt_file.remove(place)
        assert not ckpt_file.exists(place)
        with pytest.raises(CheckpointFileNotFound, match="does not exist"):
            ckpt_file.read(place)


def test_a_bucket_by_options(
    s3: S3Server, s3_credentials: None, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    ckpt_file.write(CHECKPOINT, f"{prefix}/m.ckpt", {"endpoint_url": s3.endpoint})
    assert same(
        ckpt_file.read(f"{prefix}/m.ckpt", storage_options={"client_kwargs": {"endpoint_url": s3.endpoint}})
    )
    with pytest.raises(
        MisconfigurationException, match="anon unknown; s3:// takes endpoint_url, region_name"
    ):
        ckpt_file.write(CHECKPOINT, f"{prefix}/m.ckpt", {"anon": True})
    with pytest.raises(StoreConfigError, match="an object is s3://bucket/key"):
        ckpt_file.write(CHECKPOINT, "s3://bucket")
    with pytest.raises(StoreConfigError, match="bucket 'nowhere' does not exist"):
        ckpt_file.write(CHECKPOINT, "s3://nowhere/m.ckpt", {"endpoint_url": s3.endpoint})


# ---- Lightning's layout


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        LoopState(),
        LoopState(epoch=3, step=30, total_batches=60, stepped=30),
        LoopState(epoch=2, batches=4, step=22, total_batches=44, stepped=22),
    ],
)
def test_a_position_survives_lightnings_layout(state: LoopState, automatic: bool) -> None:
    loops = ckpt_layout.loops(state, automatic=automatic)
    assert ckpt_layout.position({"loops": loops, "global_step": state.step}) == state
