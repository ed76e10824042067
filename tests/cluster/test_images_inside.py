"""The images themselves, run without Kubernetes: what is in them works for the user and the root that pods have."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from devcluster.images import sandbox
from devcluster.images.build import ImageRef, build
from devcluster.images.files import REPOSITORY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="building images takes root")

RANKS = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
os.write(1, f"rank {dist.get_rank()} of {dist.get_world_size()}: {total.item():g}\\n".encode())  # whole, unlike print
dist.destroy_process_group()
"""
# Modules without byte code would be compiled anew in every process, since the root is read-only in pods.
UNCOMPILED = """
import importlib.util, os, sys
folders = [path for path in sys.path if path.startswith(("/opt/trainyard", "/usr/lib/python3"))]
found = set()
for folder in folders:
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            if name.endswith(".py") and not os.path.exists(importlib.util.cache_from_source(path)):
                found.add(path)
assert any("/opt/trainyard/app" in path for path in folders), folders
print(*sorted(found), sep="\\n")
"""


@pytest.fixture(scope="module")
def trainer() -> ImageRef:
    return build("trainer")


@pytest.fixture(scope="module")
def operator() -> ImageRef:
    return build("operator")


def said(image: ImageRef, *program: str, volumes: dict[Path, str] | None = None) -> str:
    result = sandbox.run(image, *program, volumes=volumes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_ranks_meet_by_static_rendezvous(trainer: ImageRef, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    tmp_path.chmod(0o755)
    static = "--nnodes=1 --nproc-per-node=2 --node-rank=0 --rdzv-backend=static --max-restarts=0"
    where = "--master-addr=127.0.0.1 --master-port=29511"
    launch = ("python3", "-m", "torch.distributed.run", *static.split(), *where.split(), "/ranks.py")
    assert sorted(said(trainer, *launch, volumes={script: "/ranks.py"}).splitlines()) == [
        "rank 0 of 2: 3",
        "rank 1 of 2: 3",
    ]


def test_the_trainer_has_what_it_imports(trainer: ImageRef) -> None:
    program = "import boto3, numpy, sklearn.datasets, torch, trainyard_agent, trainyard_api, os; " + (
        "print(boto3.__file__, sklearn.datasets.load_digits().data.shape, os.getuid())"
    )
    assert (
        said(trainer, "python3", "-c", program) == "/opt/trainyard/lib/boto3/__init__.py (1797, 64) 65532\n"
    )


def test_the_operator_has_what_it_imports(operator: ImageRef) -> None:
    program = "import aiohttp, kopf, os, prometheus_client, trainyard_api, trainyard_operator, uvloop, yaml; "
    assert (
        said(operator, "python3", "-c", program + "print(os.getuid(), os.path.expanduser('~'))")
        == "65532 /tmp\n"
    )


def test_the_operator_knows_its_version(operator: ImageRef) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] in said(operator, "python3", "-m", "trainyard_operator", "version")


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_pythonpath_of_a_user_does_not_hide_our_packages(target: str) -> None:
    program = "PYTHONPATH=/elsewhere python3 -c 'import trainyard_api; print(trainyard_api.__file__)'"
    assert said(build(target), "sh", "-c", program).startswith("/opt/trainyard/app/")


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_every_module_is_compiled(target: str) -> None:
    lines = said(build(target), "python3", "-c", UNCOMPILED).splitlines()
    # A file of joblib's tests, in an encoding of its own, which nobody imports.
    assert [line for line in lines if line and "special_encoding" not in line] == []


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_no_compiler_no_installer_and_nothing_writable_of_ours(target: str) -> None:
    program = "for each in cc gcc g++ clang ld pip; do command -v $each; done; find /opt -writable ! -type l"
    assert said(build(target), "sh", "-c", program) == ""


def test_an_unchanged_tree_is_the_same_image(operator: ImageRef) -> None:
    assert build("operator") == operator
