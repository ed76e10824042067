"""What decides an image, and that the Dockerfile, .dockerignore and the list of inputs say the same."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from devcluster.images import inputs
from devcluster.images.files import REPOSITORY

TARGET = inputs.Target(
    base="python", lock="operator", copies=("locks/operator.txt", "operator/trainyard_api")
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in ("Dockerfile", ".dockerignore", "locks/operator.txt", "operator/trainyard_api/contract.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize(
    "name", ["Dockerfile", ".dockerignore", "locks/operator.txt", "operator/trainyard_api/contract.py"]
)
def test_every_input_decides_the_key(checkout: Path, name: str) -> None:
    before = inputs.key(checkout, TARGET)
    (checkout / name).write_text("changed")
    assert inputs.key(checkout, TARGET) != before


def test_a_new_and_a_renamed_module_decide_the_key(checkout: Path) -> None:
    package = checkout / "operator/trainyard_api"
    keys = [inputs.key(checkout, TARGET)]
    (package / "new.py").write_text("x = 1\n")
    keys.append(inputs.key(checkout, TARGET))
    (package / "new.py").rename(package / "renamed.py")
    keys.append(inputs.key(checkout, TARGET))
    assert len(set(keys)) == 3


def test_the_base_and_the_build_arguments_decide_the_key(checkout: Path) -> None:
    other = inputs.Target(base="python", lock="operator", copies=TARGET.copies, arguments=("TORCH=pypi",))
    keys = {
        inputs.key(checkout, TARGET, "sha256:1"),
        inputs.key(checkout, TARGET, "sha256:2"),
        inputs.key(checkout, other, "sha256:1"),
    }
    assert len(keys) == 3


def test_what_tools_leave_behind_does_not_decide_the_key(checkout: Path) -> None:
    before = inputs.key(checkout, TARGET)
    package = checkout / "operator/trainyard_api"
    for litter in (
        "__pycache__/contract.cpython-311.pyc",
        "stray.pyc",
        ".mypy_cache/cache.json",
        ".contract.py.swp",
    ):
        (package / litter).parent.mkdir(exist_ok=True)
        (package / litter).write_text("litter")
    os.utime(package / "contract.py", (1, 1))
    (package / "contract.py").chmod(0o600)
    assert inputs.key(checkout, TARGET) == before


def test_a_staged_context_has_the_checkouts_key_and_nothing_else(checkout: Path, tmp_path: Path) -> None:
    (checkout / "secrets.env").write_text("not for the image")
    (checkout / "operator/trainyard_api/__pycache__").mkdir()
    (checkout / "operator/trainyard_api/__pycache__/x.pyc").write_text("byte code")
    (checkout / "operator/trainyard_api/contract.py").chmod(0o600)
    context = tmp_path / "context"
    inputs.stage(checkout, TARGET, context)
    staged = {str(path.relative_to(context)) for path in context.rglob("*") if path.is_file()}
    assert staged == {
        "Dockerfile",
        ".dockerignore",
        "locks/operator.txt",
        "operator/trainyard_api/contract.py",
    }
    assert inputs.key(context, TARGET) == inputs.key(checkout, TARGET)
    assert {path.stat().st_mode & 0o777 for path in context.rglob("*") if path.is_file()} == {0o644}


def test_a_missing_input_is_named(checkout: Path) -> None:
    shutil.rmtree(checkout / "operator")
    with pytest.raises(FileNotFoundError, match="operator/trainyard_api"):
        inputs.key(checkout, TARGET)


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, in logical lines; the arguments before the first stage are under ""."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("FROM "):
            name = line.split(" AS ")[1]
            found[name] = [line]
        elif line.strip():
            found[name].append(line)
    return found


def reached(name: str, among: dict[str, list[str]]) -> set[str]:
    """The stage and all that it stands on or copies from."""
    names = {name}
    for line in among[name]:
        used = re.findall(r"^FROM (\S+)|--from=([\w-]+)|from=([\w-]+)", line)
        for other in {each for group in used for each in group if each in among} - names:
            names |= reached(other, among)
    return names


@pytest.mark.parametrize("name", list(inputs.TARGETS))
def test_the_key_covers_what_the_dockerfile_copies(name: str) -> None:
    found = stages()
    copied = set()
    for stage in reached(name, found):
        for line in found[stage]:
            if line.startswith("COPY ") and "--from=" not in line:
                copied |= set(line.split()[1:-1])
    assert copied == set(inputs.TARGETS[name].copies)


def test_dockerignore_lets_through_what_is_copied_and_no_more() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {name for target in inputs.TARGETS.values() for name in target.copies}
    assert "*" in lines
    assert allowed == {"locks" if name.startswith("locks/") else name for name in copied}


@pytest.mark.parametrize("name", list(inputs.TARGETS))
def test_final_images_run_unprivileged_with_the_code_as_their_last_layer(name: str) -> None:
    last = stages()[name]
    assert "USER 65532:65532" in last
    assert last[-1] == f"COPY --from={name}-app /app /opt/trainyard/app"
    # What a final stage runs, it leaves behind; everything is made in the stages before.
    assert not any(line.startswith("RUN ") for line in last)


def test_the_images_label_has_the_projects_version() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert all(f"ARG VERSION={version}" in stages()[name] for name in inputs.TARGETS)


def test_everything_from_the_network_is_checked_by_hash() -> None:
    installs = [
        line
        for lines in stages().values()
        for line in lines
        if "pip install" in line or " install --quiet" in line
    ]
    assert len(installs) == 3
    assert all("--require-hashes" in line and "--only-binary :all:" in line for line in installs)
