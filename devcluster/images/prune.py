"""Gives disk space back: what the present checkout does not need, or all of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from devcluster.images import base, build, buildah, files, inputs, locks, wheelhouse
from devcluster.progress import step


def prune(*, everything: bool) -> int:
    """Remove images, bases and wheels that the checkout as it is now would not use; returns the bytes freed.

    With `everything` the whole cache of images goes; the next build then takes minutes.
    """
    with (
        files.exclusive("removing images"),
        step("removing " + ("all images" if everything else "images of other states of the checkout")),
    ):
        before = used(files.home())
        if everything:
            shutil.rmtree(files.home(), ignore_errors=True)
            return before
        _images()
        _bases()
        _blobs()
        _wheels()
        return before - used(files.home())


def _images() -> None:
    wanted = {image.oci_layout for target in inputs.TARGETS if (image := build.find(target))}
    for image in build.images():
        if image.oci_layout not in wanted:
            build.remove(image)
    if files.storage().exists():
        buildah.forget_interrupted()
        buildah.run("rmi", "--prune", "--force", check=False)


def _bases() -> None:
    wanted = {found.folder: found.ref for kind in base.RECIPES if (found := base.find(kind))}
    for folder in files.bases().glob("*"):
        if folder not in wanted:
            shutil.rmtree(folder)
    if files.storage().exists():
        listed = buildah.run(
            "images",
            "--format",
            "{{.Name}}:{{.Tag}}",
            "--filter",
            "reference=localhost/trainyard/base-*",
            check=False,
        )
        for ref in set(listed.split()) - set(wanted.values()):
            buildah.run("rmi", "--force", ref, check=False)


def _blobs() -> None:
    """A blob which only the pool links to belongs to no layout any more."""
    for path in files.blobs().glob("*"):
        if path.stat().st_nlink == 1:
            path.unlink()


def _wheels() -> None:
    known = {found.python for kind in base.RECIPES if (found := base.find(kind))}
    wanted = {wheelhouse.folder(lock, python) for lock in locks.LOCKS for python in known}
    for folder in files.wheels().glob("*"):
        if folder not in wanted:
            shutil.rmtree(folder)


def used(folder: Path) -> int:
    """Bytes on the disk below a folder, hard links counted once."""
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.is_file():
            stat = path.stat()
            seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return sum(seen.values())
