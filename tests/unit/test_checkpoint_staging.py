"""Staged files: what is in them, what is used again, and what is left behind when something goes wrong: nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from trainyard.checkpoint import staging
from trainyard.checkpoint.format.dtypes import NAMES
from trainyard.checkpoint.mapped import MappedFile
from trainyard.checkpoint.plan import assign
from trainyard.checkpoint.staging import FREE, StagedFile, StagingFolder, stage
from trainyard_api.checkpoints import shard_key

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> StagingFolder:
    return StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path)})


def put(folder: StagingFolder, tensors: dict[str, torch.Tensor], step: int = 1, rank: int = 0) -> StagedFile:
    pieces = assign(tensors, rank=0, world=1)
    return stage(pieces, {"rank": {"step": step}}, folder, step=step, attempt=1, rank=rank, world=rank + 1)


def content(file: StagedFile) -> dict[str, torch.Tensor]:
    """By safetensors itself, which checks that the header describes the whole file."""
    assert file.path.stat().st_size == file.size
    with safe_open(file.path, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: NaN equals NaN, -0.0 does not equal 0.0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(
        *(t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    )


def retire(folder: StagingFolder, file: StagedFile) -> Path:
    """As the uploader does."""
    free = folder.path / FREE / f"{file.path.parent.parent.name}.safetensors"
    free.parent.mkdir(exist_ok=True)
    file.path.rename(free)
    return free


def names(folder: StagingFolder) -> list[str]:
    return sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", [ours for _, ours in NAMES])
def test_every_dtype_of_any_strides(folder: StagingFolder, name: str) -> None:
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 8 * dtype.itemsize), generator=generator)
    plain = raw.to(torch.uint8).view(dtype)
    tensors = {
        "checkpoint.plain": plain,
        "checkpoint.turned": plain.t(),
        "checkpoint.steps": plain[::2, 1::3],
        "checkpoint.row": plain[3],
        "checkpoint.scalar": plain[2, 5],
        "checkpoint.expanded": plain[0, :1].expand(4, 3, 1),
        "checkpoint.empty": plain[:0],
    }
    if dtype.is_complex:
        tensors["checkpoint.conjugate"] = plain.conj()
        tensors["checkpoint.negative"] = plain.conj().imag
    found = content(put(folder, tensors))
    assert set(found) == set(tensors)
    assert [name for name in tensors if not same(found[name], tensors[name])] == []


def test_tensors_of_any_length_and_those_who_share_an_address(folder: StagingFolder) -> None:
    """Short ones and long ones are copied in different ways."""
    whole = torch.arange(700_000.0)
    tensors = {
        "checkpoint.long": whole, "checkpoint.long_turned": whole.reshape(700, 1000).t(), "checkpoint.short": whole[:9],
        "checkpoint.at_the_border": whole[: 1 << 18], "checkpoint.beyond_it": whole[5 : 6 + (1 << 18)],
        **{f"checkpoint.step{i}": torch.tensor(float(i)) for i in range(50)},
    }  # fmt: skip
    found = content(put(folder, tensors))
    assert [name for name in tensors if not same(found[name], tensors[name])] == []


def test_nothing_is_written_beyond_the_file(tmp_path: Path) -> None:
    file = MappedFile(tmp_path / "file", create=True)
    file.resize(5000)
    for begin in (-4, 4996, 4997, 1 << 40):
        with pytest.raises(ValueError, match="of 5000"):
            file.copy([(begin, torch.ones(2))])
    file.close()


def test_gradients_and_parameters_are_of_no_concern(folder: StagingFolder) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    product = parameter * 2
    found = content(put(folder, {"checkpoint.p": parameter, "checkpoint.q": product}))
    assert torch.equal(found["checkpoint.q"], product.detach())
    torch.autograd.backward(product.sum())  # the copy left the graph alone


def test_a_retired_file_is_written_again(folder: StagingFolder) -> None:
    """Whatever the sizes: nothing of what it held before shows."""
    inodes, lengths = set(), (5000, 5000, 1_000_000, 10, 700_000, 3_000_000, 1)
    for step, length in enumerate(lengths):
        tensors = {"checkpoint.w": torch.full((length,), float(step)), "checkpoint.n": torch.tensor(step)}
        file = put(folder, tensors, step)
        found = content(file)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        inodes.add(file.path.stat().st_ino)
        retire(folder, file)
    assert len(inodes) == 1
    assert len(names(folder)) == 1


def test_the_file_before_stays_as_it_is(folder: StagingFolder) -> None:
    first = put(folder, {"checkpoint.w": torch.ones(100)}, 1)
    put(folder, {"checkpoint.w": torch.zeros(100)}, 2)
    assert torch.equal(content(first)["checkpoint.w"], torch.ones(100))


def test_a_file_with_another_name_is_not_written_again(folder: StagingFolder, tmp_path: Path) -> None:
    """A store that is a directory may have linked it."""
    file = put(folder, {"checkpoint.w": torch.ones(100)}, 1)
    os.link(file.path, tmp_path / "committed")
    retire(folder, file)
    put(folder, {"checkpoint.w": torch.zeros(100)}, 2)
    assert torch.equal(
        content(StagedFile(tmp_path / "committed", file.size))["checkpoint.w"], torch.ones(100)
    )
    assert names(folder) == [shard_key(2, 1, 0, 1)]


def test_files_of_a_worker_before_are_used_too(folder: StagingFolder, tmp_path: Path) -> None:
    free = retire(folder, put(folder, {"checkpoint.w": torch.ones(1000)}, 1))
    inode = free.stat().st_ino
    folder.close()
    again = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path)})
    file = put(again, {"checkpoint.w": torch.zeros(3000)}, 2)
    assert file.path.stat().st_ino == inode
    assert torch.equal(content(file)["checkpoint.w"], torch.zeros(3000))


def test_each_rank_of_a_node_takes_the_file_that_it_has_mapped(folder: StagingFolder, tmp_path: Path) -> None:
    other = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path)})
    inodes = []
    for step in range(3):
        mine = put(folder, {"checkpoint.w": torch.ones(10)}, 2 * step, rank=0)
        its = put(other, {"checkpoint.w": torch.zeros(10)}, 2 * step + 1, rank=1)
        inodes.append((mine.path.stat().st_ino, its.path.stat().st_ino))
        assert torch.equal(content(mine)["checkpoint.w"], torch.ones(10))
        assert torch.equal(content(its)["checkpoint.w"], torch.zeros(10))
        retire(folder, its)
        retire(folder, mine)
    assert len(set(inodes)) == 1


def test_what_is_prepared_is_what_is_written(folder: StagingFolder) -> None:
    folder.prepare(2_000_000)
    file = put(folder, {"checkpoint.w": torch.ones(400_000)}, 1)
    assert names(folder) == [shard_key(1, 1, 0, 1)], "it was taken"
    assert torch.equal(content(file)["checkpoint.w"], torch.ones(400_000))
    for _ in range(2):  # once is enough
        folder.prepare(2_000_000)
        folder._settle()
        assert len(names(folder)) == 2
    inode = next((folder.path / FREE).iterdir()).stat().st_ino
    assert put(folder, {"checkpoint.w": torch.ones(400_000)}, 2).path.stat().st_ino == inode


def test_a_copy_that_fails_leaves_nothing(folder: StagingFolder) -> None:
    pieces = assign(
        {"checkpoint.a": torch.ones(9), "checkpoint.b": torch.ones(9, device="meta")}, rank=0, world=1
    )
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            stage(pieces, {}, folder, step=1, attempt=1, rank=0, world=1)
        assert names(folder) == []
        retire(folder, put(folder, {"checkpoint.a": torch.ones(9)}, 2))


_LIMITED = """
import os, resource, sys, torch
from pathlib import Path
from trainyard.checkpoint.plan import assign
from trainyard.checkpoint.staging import StagingFolder, stage
folder = StagingFolder({"TRAINYARD_RUNTIME_DIR": sys.argv[1]})
def put(count, step):
    return stage(assign({"checkpoint.w": torch.ones(count)}, rank=0, world=1), {}, folder, step=step, attempt=1, rank=0, world=1)
small = put(1000, 1)
(folder.path / "free").mkdir()
small.path.rename(folder.path / "free" / "small.safetensors")
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
for attempt in range(2):
    try:
        put(2 << 20, 2)
        print("no error")
    except OSError as error:
        print(error.errno, error.strerror, sep="|")
    print(sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()))
print(put(1000, 3).path.stat().st_size)
if sys.argv[2] == "full":
    from trainyard.checkpoint.mapped import MappedFile
    file = MappedFile(folder.path / "cow", create=True)
    file.resize(1 << 20)
    os.truncate(folder.path / "cow", 0)
    os.truncate(folder.path / "cow", 16 << 20)  # holes: what rewriting is on a file system that copies on write
    file._whole = 16 << 20
    file._in_place = False
    try:
        file.resize(16 << 20)
        print("no error")
    except OSError as error:
        print(error.errno)
"""


def limited(*command: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT / 'operator'}{os.pathsep}{ROOT / 'trainer-image'}"
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_a_file_that_may_not_grow_is_an_error_in_words(tmp_path: Path) -> None:
    done = limited(sys.executable, "-c", _LIMITED, str(tmp_path), "limit")
    assert done.returncode == 0, done.stderr
    words = f"{errno.EFBIG}|no room for a shard of 8392704 bytes in the staging folder: File too large"
    assert done.stdout.splitlines()[:4] == [words, "[]", words, "[]"]
    assert int(done.stdout.splitlines()[4]) == 8096, "the next one is all right"


def test_a_full_disk_is_an_error_in_words_and_not_a_signal(tmp_path: Path) -> None:
    """A real file system of 6 MiB, in a mount namespace of its own."""
    probe = limited("unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path))
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
    script = f'mount -t tmpfs -o size=6m tmpfs "{tmp_path}" && exec "$@"'
    done = limited(
        "unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-c", _LIMITED, str(tmp_path), "full"
    )
    assert done.returncode == 0, done.stderr
    words = (
        f"{errno.ENOSPC}|no room for a shard of 8392704 bytes in the staging folder: No space left on device"
    )
    lines = done.stdout.splitlines()
    assert lines[:4] == [words, "[]", words, "[]"]
    assert lines[4:] == ["8096", str(errno.ENOSPC)]


_WRITER = """
import sys, time
from pathlib import Path
from trainyard.checkpoint.staging import StagingFolder
folder = StagingFolder({"TRAINYARD_RUNTIME_DIR": sys.argv[1]})
with folder.writing(folder.path / "data/step-1/a1/shard.safetensors", 10000):
    print("writing", flush=True)
    time.sleep(120)
"""


def test_what_a_killed_worker_had_begun_is_swept_but_not_what_lives(tmp_path: Path) -> None:
    path = f"{ROOT / 'operator'}{os.pathsep}{ROOT / 'trainer-image'}"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as writer:  # fmt: skip
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        living = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path)})
        assert names(living) == ["data/step-1/a1/shard.tmp"]
        writer.send_signal(signal.SIGKILL)
    assert names(StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path)})) == []


def test_beside_a_directory_it_is_on_its_file_system_and_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_YOUNG_SECONDS", 0)
    target = tmp_path / "checkpoints" / "here"
    first = StagingFolder({}, target=target)
    assert first.path.parent == target
    assert first.path.name.startswith(".")
    assert first.path.stat().st_mode & 0o077 == 0, "nobody else's business"
    left = target / f"{first.path.name}-left"
    left.mkdir()
    second = StagingFolder({}, target=target)
    assert not left.exists()
    assert first.path.exists(), "its owner lives"
    first.close()
    second.close()
    assert list(target.iterdir()) == []
    pod = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(tmp_path / "rt")}, target=target)
    assert pod.path == tmp_path / "rt" / "staging", "where its uploader looks"


def test_without_either_it_is_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = StagingFolder({})
    assert folder.path.parent == tmp_path
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    mine = MappedFile(tmp_path / "file", create=True)
    with pytest.raises(BlockingIOError):
        MappedFile(tmp_path / "file", create=False)
    mine.unlock()
    MappedFile(tmp_path / "file", create=False).close()
    mine.close()


def test_no_link_is_followed(tmp_path: Path, folder: StagingFolder) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (folder.path / FREE).mkdir()
    (folder.path / FREE / "trap.safetensors").symlink_to(victim)
    put(folder, {"checkpoint.w": torch.ones(3)})
    assert victim.read_bytes() == b"precious"


def test_the_skeletons_are_in_the_header(folder: StagingFolder) -> None:
    from trainyard.checkpoint.format.shardfile import header_length, read_header

    trees: dict[str, Any] = {"rank": {"a": [1, None, {"$tensor": "checkpoint.w"}]}, "checkpoint": "text"}
    file = stage(
        assign({"checkpoint.w": torch.ones(3)}, rank=0, world=1),
        trees,
        folder,
        step=1,
        attempt=1,
        rank=0,
        world=1,
    )
    data = file.path.read_bytes()
    header = read_header(data[: header_length(data[:8], file.size)], file.size)
    assert header.trees == trees


def test_large_tensors_are_whole_on_a_disk_and_in_memory(tmp_path: Path) -> None:
    tmpfs = Path("/dev/shm")  # noqa: S108 - a folder of our own in it
    memory = Path(tempfile.mkdtemp(dir=tmpfs if os.access(tmpfs, os.W_OK) else tmp_path))
    try:
        for place in (tmp_path / "disk", memory):
            folder = StagingFolder({"TRAINYARD_RUNTIME_DIR": str(place)})
            for step in (1, 2):
                tensors = {
                    "checkpoint.a": torch.randn(700, 300),
                    "checkpoint.b": torch.randn(300, 500).t(),
                    "checkpoint.c": torch.randn(90_001).to(torch.bfloat16),
                    "checkpoint.d": torch.randn(5),
                }
                file = put(folder, tensors, step)
                found = content(file)
                assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
                (folder.path / FREE).mkdir(exist_ok=True)
                file.path.replace(folder.path / FREE / "again.safetensors")
            folder.close()
    finally:
        shutil.rmtree(memory)
