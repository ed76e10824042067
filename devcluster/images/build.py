"""Builds the operator's and the trainer's images from the Dockerfile, for the development cluster."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.images import base, buildah, files, inputs, layout, wheelhouse
from devcluster.images.layout import ImageRef
from devcluster.progress import say, step

__all__ = ["ImageRef", "build"]

_FORMAT = 2  # of what this module does with the inputs; part of the key
# Layouts kept for each target: their large layers are shared, so that one more costs a few hundred kilobytes.
KEPT = 8


def repository(target: str) -> str:
    return f"localhost/trainyard/{target}"


def build(target: str, *, root: Path = files.REPOSITORY) -> ImageRef:
    """The image of the checkout as it is now, built unless it has been built before.

    Raises ValueError for an unknown target, and DevclusterError with the end of the log for a failed build.
    """
    if target not in inputs.TARGETS:
        raise ValueError(f"unknown target {target!r}: choose from {', '.join(inputs.TARGETS)}")
    if image := find(target, root=root):
        return image
    with files.exclusive(f"building the {target}'s image"):
        # Another process may have built it while this one waited.
        return find(target, root=root) or _build(target, root)


def find(target: str, *, root: Path = files.REPOSITORY) -> ImageRef | None:
    """The image of the checkout as it is now, if it has been built."""
    what = inputs.TARGETS[target]
    below = base.find(what.base)
    image = _published(target, inputs.key(root, what, below.digest, str(_FORMAT))) if below else None
    if image:
        os.utime(image.oci_layout)  # the least recently used are the first to go
    return image


def _build(target: str, root: Path) -> ImageRef:
    what = inputs.TARGETS[target]
    buildah.packages()
    below = base.ensure(what.base)
    wheels = wheelhouse.ensure(what.lock, below.python)
    buildah.forget_interrupted()
    base.stored(below)
    with files.workspace() as work:
        inputs.stage(root, what, work / "context")
        tag = inputs.key(work / "context", what, below.digest, str(_FORMAT))
        if image := _published(target, tag):
            return image
        name = f"{repository(target)}:{tag}"
        with step(f"building {name}, because no image of this checkout's files is in the cache"):
            _run_dockerfile(target, name, work / "context", below.ref, wheels)
        with step(f"writing {name} into an OCI layout"):
            _publish(target, name, tag, work / "layout")
    image = _published(target, tag)
    if image is None:
        raise DevclusterError(f"{name} is not where it was just put: {files.layouts()}")
    _retire(target)
    say(f"built {image.ref} ({layout.size(image.oci_layout) / 1e6:.0f} MB, {image.digest[:19]})")
    return image


def _run_dockerfile(target: str, name: str, context: Path, base_image: str, wheels: Path) -> None:
    arguments = [
        f"--build-arg={each}" for each in (f"BASE_IMAGE={base_image}", *inputs.TARGETS[target].arguments)
    ]
    buildah.run_logged(
        "build",
        "--isolation=chroot",  # needs neither a runtime nor cgroups
        "--pull=never",
        "--layers",
        "--timestamp=0",  # equal files give equal layers
        "--format=oci",
        f"--target={target}",
        *arguments,
        f"--build-context=wheels={wheels}",
        f"--tag={name}",
        f"--tag={repository(target)}:dev",
        context,
        log=files.home() / "logs" / f"build-{target}.log",
        seconds=1500,
    )


def _publish(target: str, name: str, tag: str, folder: Path) -> None:
    layout.link_pool(folder)
    buildah.run("push", "--quiet", name, f"oci:{folder}:{tag}", seconds=900)
    layout.finish(
        folder, layout.uncompress(folder, layout.manifests(folder)[-1]), [name, f"{repository(target)}:dev"]
    )
    final = files.layouts() / f"{target}-{tag}"
    final.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(final)


def _published(target: str, tag: str) -> ImageRef | None:
    folder = files.layouts() / f"{target}-{tag}"
    try:
        digest = layout.manifests(folder)[0]["digest"]
    except FileNotFoundError:
        return None
    return ImageRef(repository(target), tag, digest, folder)


def images() -> list[ImageRef]:
    """Every image in the cache, the most recently used first."""
    folders = sorted(files.layouts().glob("*-*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    parts = [folder.name.rpartition("-") for folder in folders]
    return [image for target, _, tag in parts if (image := _published(target, tag))]


def _retire(target: str) -> None:
    """Remove all but the newest images of a target."""
    for image in [each for each in images() if each.name == repository(target)][KEPT:]:
        remove(image)


def remove(image: ImageRef) -> None:
    """Remove an image's layout and its name in buildah's store; only within `files.exclusive`."""
    shutil.rmtree(image.oci_layout)
    buildah.run("untag", image.ref, image.ref, check=False)
