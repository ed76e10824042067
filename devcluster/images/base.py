"""The test base images: Python alone for the operator, Python with torch for the trainer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.images import buildah, files, layout, rootfs
from devcluster.progress import say, step

_PYTHON = ("ca-certificates", "python3")
_SMOKE = "import json, platform, ssl, sys, venv; "
RECIPES = {
    "python": rootfs.Recipe(
        packages=_PYTHON, minutes=1, smoke=_SMOKE + "print('Python', platform.python_version())"
    ),
    "torch": rootfs.Recipe(
        packages=(*_PYTHON, "python3-torch", "python3-numpy", "python3-sklearn"),
        minutes=2.5,
        without_libuv=True,
        smoke=_SMOKE + "import numpy, sklearn.datasets, sklearn.linear_model, torch, torch.distributed.run; "
        "from torch.distributed import TCPStore; TCPStore('127.0.0.1', 0, is_master=True); "
        "print('Python', platform.python_version(), 'torch', torch.__version__, 'numpy', numpy.__version__)",
    ),
}
_FORMAT = 1  # of what this module writes; part of the key


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """A base image in the cache."""

    kind: str
    key: str
    """Hash of the recipe. Debian moves on below it: `base --refresh` makes it anew."""
    digest: str
    python: str
    """3.14"""
    folder: Path

    @property
    def ref(self) -> str:
        """What BASE_IMAGE is set to: names the content, so that a refreshed base has another name."""
        return f"localhost/trainyard/base-{self.kind}:{self.digest.removeprefix('sha256:')[:12]}"


def key(kind: str) -> str:
    """Short hash of everything in this repository that decides what the base image is."""
    digest = hashlib.sha256(repr((_FORMAT, RECIPES[kind], rootfs.SUITE, rootfs.SCRIPT, rootfs.TRIM)).encode())
    if RECIPES[kind].without_libuv:
        digest.update(rootfs.SITE.read_bytes())
    digest.update(layout.architecture().encode())
    return digest.hexdigest()[:12]


def find(kind: str) -> Base | None:
    """The base image if it has been made."""
    folder = files.bases() / f"{kind}-{key(kind)}"
    try:
        about = json.loads((folder / "base.json").read_text())
    except FileNotFoundError:
        return None
    return Base(kind, key(kind), about["digest"], about["python"], folder)


def ensure(kind: str, *, refresh: bool = False) -> Base:
    """The base image, made now where it is missing; only within `files.exclusive`."""
    if kind not in RECIPES:
        raise ValueError(f"unknown base {kind!r}: choose from {', '.join(RECIPES)}")
    if not refresh and (base := find(kind)):
        return base
    say(
        f"making base image {kind!r} because "
        + ("a new one was asked for" if refresh else "the cache has none of this recipe")
    )
    buildah.packages()
    with files.workspace() as work:
        root = work / "root"
        root.mkdir(mode=0o755)
        rootfs.make(root, RECIPES[kind], files.home() / "logs" / f"debootstrap-{kind}.log")
        python = rootfs.run_inside(
            root, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"
        ).strip()
        packages = rootfs.run_inside(root, "dpkg-query", "-W", "-f", "${Package} ${Version}\n").splitlines()
        with step("packing the base image into one layer"):
            layer = _pack(root)
        _publish(kind, layer, work / "layout", {"python": python, "packages": packages})
    made = find(kind)
    if made is None:
        raise DevclusterError(f"base image {kind!r} is not where it was just put: {files.bases()}")
    return made


def stored(base: Base) -> None:
    """See to it that buildah has the base image; only within `files.exclusive`."""
    buildah.unpack(base.folder, base.kind, layout.config_digest(base.folder, base.digest), base.ref)


def _pack(root: Path) -> dict[str, object]:
    """The root file system as a layer, uncompressed: nodes and buildah take that in faster.

    GNU tar, for it is several times faster than Python's; entries sorted and owners by number, so that equal
    trees give equal bytes. The contents of dev, proc and sys belong to whoever runs the container.
    """
    excluded = [f"--exclude=./{folder}/*" for folder in ("dev", "proc", "sys", "run")]
    command = [
        "tar",
        "--create",
        "--sort=name",
        "--numeric-owner",
        "--format=gnu",
        "--one-file-system",
        "-C",
        str(root),
    ]
    with subprocess.Popen([*command, "--anchored", *excluded, "."], stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise DevclusterError("tar has no standard output")
        layer = layout.put_stream(process.stdout)
    if process.returncode != 0:
        raise DevclusterError(f"tar of the base image exited with {process.returncode}")
    return layer


def _publish(kind: str, layer: dict[str, object], folder: Path, about: dict[str, object]) -> None:
    config = {
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Cmd": ["python3"],
    }
    digest = layout.write_single_layer(folder, layer, tag=kind, config=config)
    (folder / "base.json").write_text(json.dumps({"digest": digest, **about}, indent=1))
    final = files.bases() / f"{kind}-{key(kind)}"
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():  # a refresh; on a crash between the two renames the base is simply made again
        final.rename(folder.with_name("replaced"))
    folder.rename(final)
