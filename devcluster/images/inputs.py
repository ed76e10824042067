"""What an image is made of, as one hash: two trees that would give the same image have the same hash."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A target of the Dockerfile, and what of the checkout its stages copy (a test compares the two)."""

    base: str
    lock: str
    """Packages which are installed from wheels."""
    copies: tuple[str, ...]
    """Files and folders, relative to the checkout."""
    arguments: tuple[str, ...] = ()


TARGETS = {
    "operator": Target(
        base="python",
        lock="operator",
        copies=(
            "pyproject.toml",
            "locks/operator.txt",
            "operator/trainyard_api",
            "operator/trainyard_operator",
        ),
    ),
    "trainer": Target(
        base="torch",
        lock="trainer",
        copies=(
            "pyproject.toml",
            "locks/trainer.txt",
            "locks/torch.txt",
            "locks/examples.txt",
            "operator/trainyard_api",
            "trainer-image/trainyard",
            "trainer-image/trainyard_agent",
        ),
        # The base image brings torch and scikit-learn.
        arguments=("TORCH=base",),
    ),
}
RECIPE = ("Dockerfile", ".dockerignore")


def listed(root: Path, target: Target) -> Iterator[Path]:
    """Every file that goes into the image or decides how it is made, relative to the root, in fixed order."""
    for name in (*RECIPE, *target.copies):
        path = root / name
        if path.is_file():
            yield Path(name)
        elif path.is_dir():
            yield from sorted(
                each.relative_to(root)
                for each in path.rglob("*")
                if each.is_file() and not _ignored(each, path)
            )
        else:
            raise FileNotFoundError(f"the image needs {name}, which {root} has not got")


def _ignored(path: Path, below: Path) -> bool:
    """What tools leave in a checkout: byte code and hidden files; .dockerignore leaves out the same."""
    parts = path.relative_to(below).parts
    return path.suffix == ".pyc" or any(part == "__pycache__" or part.startswith(".") for part in parts)


def key(root: Path, target: Target, *others: str) -> str:
    """Hash of the files' names and contents, of the target, and of whatever else decides the image."""
    digest = hashlib.sha256(repr((target, others)).encode())
    for name in listed(root, target):
        data = (root / name).read_bytes()
        digest.update(f"\0{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12]


def stage(root: Path, target: Target, context: Path) -> None:
    """Copy the files into a build context: a checkout may be edited while its image is being built.

    All get one mode: the checkout's depend on the umask of whoever made it, and must not decide the digest.
    """
    for name in target.copies:
        if (root / name).is_dir():
            (context / name).mkdir(parents=True)
    for file in listed(root, target):
        (context / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, context / file)
    for path in context.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
