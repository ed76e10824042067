"""The parts of the base images' making that need neither root nor a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devcluster.images import mirror, rootfs

TARGETS = """\
DEP-11|Debian|Debian|main|bookworm|http://mirror.example/debian/
Packages|Debian|Debian-Security|main|bookworm-security|http://mirror.example/debian-security/
Packages|Somebody|Debian|main|bookworm|http://third-party.example/debian/
Packages|Debian|Debian|main|bookworm-updates|http://updates.example/debian/
Packages|Debian|Debian|main|bookworm|http://mirror.example/debian/
"""
# Stands for torch where there is none: the class is made in the package, and another module takes it over by name.
TORCH = {
    "torch/__init__.py": "",
    "torch/distributed/__init__.py": """
class TCPStore:
    def __init__(self, host, port, world_size=None, is_master=False, timeout=None, wait=True, multi=False, fd=None,
                 use_libuv=True):
        self.seen = (host, port, is_master, use_libuv)
def is_available():
    return True
from torch.distributed import rendezvous
""",
    "torch/distributed/rendezvous.py": "from torch.distributed import TCPStore\n",
}
PROGRAM = """
import importlib.util
assert importlib.util.find_spec("torch.distributed") is not None  # as programs do that only ask
from torch.distributed.rendezvous import TCPStore
print(TCPStore("h", 1, is_master=True).seen)
print(TCPStore("h", 1, use_libuv=True).seen)
print(TCPStore("h", 1, 2, True, 3, True, False, 4, True).seen)
"""


def test_the_mirror_is_debians_own_archive() -> None:
    assert mirror.choose(TARGETS.splitlines()) == "http://mirror.example/debian"


def test_no_mirror_among_third_parties() -> None:
    assert mirror.choose(TARGETS.splitlines()[:4]) is None


def test_the_mirror_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mirror.VARIABLE, "http://chosen.example/debian")
    assert mirror.find() == "http://chosen.example/debian"


def test_no_store_uses_libuv_however_it_is_made(tmp_path: Path) -> None:
    for name, text in TORCH.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "sitecustomize.py").write_text(rootfs.SITE.read_text())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert said.splitlines() == ["('h', 1, True, False)", "('h', 1, False, False)", "('h', 1, True, False)"]


def test_trimming_takes_what_is_listed_and_follows_no_link(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("of the host")
    packages = "usr/lib/python3/dist-packages"
    gone = [
        f"{packages}/scipy/sparse/tests/test_x.py",
        f"{packages}/torch/bin/test_jit",
        "var/lib/apt/lists/x",
        "tmp/x",
    ]
    kept = [
        f"{packages}/torch/bin/torch_shm_manager",
        f"{packages}/scipy/sparse/_x.py",
        "usr/lib/x86_64-linux-gnu/libz3.so.4",
    ]
    for name in [*gone, *kept]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / "var/log").mkdir()
    (root / "var/log/link").symlink_to(outside)
    rootfs._trim(root)
    assert [name for name in gone if (root / name).exists()] == []
    assert [name for name in kept if not (root / name).exists()] == []
    assert not (root / "var/log/link").is_symlink()
    assert (outside / "precious").exists()
