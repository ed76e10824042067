"""The locks: pins with hashes and nothing else, covering pyproject.toml, and agreeing where they meet."""

from __future__ import annotations

import re
import tomllib

import pytest

from devcluster.errors import DevclusterError
from devcluster.images import locks
from devcluster.images.files import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
HASH = "    --hash=sha256:" + "a" * 64


@pytest.mark.parametrize("name", list(locks.LOCKS))
def test_a_lock_is_pins_and_hashes_only(name: str) -> None:
    text = locks.path(name).read_text()
    locks.check_text(name, text)
    assert "://" not in text and "@" not in text
    # Every pin has at least one hash: a pin's line is followed by a hash's.
    assert not re.search(r"\\\n(?!    --hash)", text)


@pytest.mark.parametrize("name", list(locks.LOCKS))
def test_a_lock_covers_its_requirements(name: str) -> None:
    wanted = {locks.name_of(each) for each in locks.LOCKS[name].requirements(PROJECT)}
    assert wanted and wanted <= set(locks.pins(locks.path(name).read_text()))


def test_every_lock_in_the_folder_is_one_that_is_kept_fresh() -> None:
    assert {path.stem for path in locks.FOLDER.glob("*.txt")} == set(locks.LOCKS)


def test_locks_that_are_installed_together_agree() -> None:
    together = [locks.pins(locks.path(name).read_text()) for name in ("torch", "trainer", "examples")]
    for package in set.union(*map(set, together)):
        assert len({frozenset(each[package]) for each in together if package in each}) == 1, package


def test_torch_is_new_enough_to_load_checkpoints_safely() -> None:
    for version in locks.pins(locks.path("torch").read_text())["torch"]:
        assert tuple(map(int, version.split(".")[:2])) >= (2, 10)  # CVE-2026-24747


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://packages.example/simple",
        "kopf @ https://packages.example/kopf.whl",
        "kopf==1.45.2",  # no hash follows
        "kopf>=1.45 \\",
        "-e .",
        "    # via kopf",
    ],
)
def test_anything_but_a_pin_is_refused(line: str) -> None:
    with pytest.raises(DevclusterError, match="line 3"):
        locks.check_text("x", f"a==1 \\\n{HASH}\n{line}\n")


def test_pins_and_markers_are_read() -> None:
    text = f"numpy==2.4.6 ; python_full_version < '3.12' \\\n{HASH}\nnumpy==2.5.5 ; python_full_version >= '3.12' \\\n{HASH}\n"
    locks.check_text("x", text)
    assert locks.pins(text) == {"numpy": {"2.4.6", "2.5.5"}}
    assert locks.name_of("Kopf[full-auth]>=1.45") == "kopf"
