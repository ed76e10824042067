"""Environments from locks: made once, by one process, from a tiny wheel that is made here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from devcluster import venvs
from devcluster.errors import DevclusterError
from devcluster.images import locks, uv

ROOT = Path(__file__).parents[2]
MAKE = """
import sys
from pathlib import Path
from devcluster import venvs
from devcluster.images import locks
locks.FOLDER = Path(sys.argv[1])
print(venvs.environment("tiny"))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of locks, with the lock `tiny`, and a cache of the test's own."""
    program = uv.find()
    cache = tmp_path / "cache"
    (cache / "uv" / "bin").mkdir(parents=True)
    (cache / "uv" / "bin" / "uv").symlink_to(program)
    monkeypatch.setenv("TRAINYARD_CACHE", str(cache))
    monkeypatch.setattr(locks, "FOLDER", tmp_path)
    write_lock(tmp_path, "1.0")
    return tmp_path


def write_lock(folder: Path, version: str) -> None:
    wheel = folder / f"tiny-{version}-py3-none-any.whl"
    about = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny.py", f"version = {version!r}\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        file.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "tiny.txt").write_text(f"tiny @ {wheel.as_uri()} --hash=sha256:{digest}\n")


def version_in(environment: Path) -> str:
    command = [environment / "bin" / "python", "-c", "import tiny; print(tiny.version)"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env={}
    ).stdout.strip()


def test_is_made_once_and_anew_when_its_lock_changes(folder: Path) -> None:
    first = venvs.environment("tiny")
    assert version_in(first) == "1.0"
    (first / "bin" / "mark").touch()
    assert venvs.environment("tiny") == first
    assert (first / "bin" / "mark").exists(), "made a second time"

    write_lock(folder, "2.0")
    second = venvs.environment("tiny")
    assert second != first
    assert version_in(second) == "2.0"
    assert version_in(first) == "1.0", "another checkout may use it still"


def test_what_was_left_half_made_is_not_used(folder: Path) -> None:
    whole = venvs.environment("tiny")
    (whole / ".complete").unlink()
    (whole / "bin" / "python").unlink()
    assert venvs.environment("tiny") == whole
    assert version_in(whole) == "1.0"


def test_processes_that_ask_at_once_get_the_same_one(folder: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, folder], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert sum("making the Python environment" in err for _, err in ended) == 1, ended


def test_a_damaged_package_and_a_missing_lock_are_refused(folder: Path) -> None:
    lock = folder / "tiny.txt"
    lock.write_text(lock.read_text()[:-6] + "00000\n")
    with pytest.raises(DevclusterError, match=r"(?i)hash"):
        venvs.environment("tiny")
    with pytest.raises(DevclusterError, match=r"no nothing\.txt in locks/"):
        venvs.environment("nothing")
