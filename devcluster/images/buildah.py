"""buildah with a store of its own inside the cache: the machine's own containers are left alone."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from devcluster import debian
from devcluster.errors import DevclusterError
from devcluster.images import files
from devcluster.progress import step, tail

# A command in namespaces of its own: its mounts vanish with it, and all of it dies with this program, so that
# an interrupted build leaves neither a mount in the cache (which rm -r would walk into) nor a process.
CONTAINED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)


def packages() -> None:
    """Install what building images needs, or say that this takes root."""
    if os.geteuid() != 0:
        raise DevclusterError(
            "building images takes root: debootstrap and buildah make device nodes and mounts"
        )
    debian.ensure([*debian.IMAGES, "debian-archive-keyring", "gpgv"], "container images are built with them")


@functools.cache
def _driver() -> str:
    """overlay where the cache's file system can carry it (an overlay cannot), else vfs, which is slow."""
    return "overlay" if _invoke("overlay", ["info"], 60).returncode == 0 else "vfs"


def _command(driver: str, arguments: Sequence[object]) -> list[str]:
    # --net: without a network, so that no step can fetch anything that is not pinned.
    return [*CONTAINED, "--net", *_program(driver), *map(str, arguments)]


def _program(driver: str) -> list[str]:
    store = files.storage() / driver
    return ["buildah", "--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", driver]


def program() -> list[str]:
    """buildah with the options that lead it to its store, for a script which is itself contained."""
    return _program(_driver())


def _invoke(
    driver: str, arguments: Sequence[object], seconds: float, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(driver, arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment(),
        timeout=seconds,
        check=False,
    )


def run(*arguments: object, seconds: float = 120, check: bool = True, folder: Path | None = None) -> str:
    """Run a short buildah command, in a folder, and return what it printed."""
    result = _invoke(_driver(), arguments, seconds, folder)
    if check and result.returncode != 0:
        raise DevclusterError(
            f"buildah {arguments[0]} failed: {(result.stderr or result.stdout).strip()[-2000:]}"
        )
    return result.stdout


def run_logged(*arguments: object, log: Path, seconds: float) -> None:
    """Run a long buildah command with its output in a log, whose end an error shows."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                _command(_driver(), arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise DevclusterError(
                f"buildah {arguments[0]} did not end within {seconds:.0f} s{tail(log)}"
            ) from None
    if code != 0:
        raise DevclusterError(f"buildah {arguments[0]} exited with {code}{tail(log, 30)}")


def forget_interrupted() -> None:
    """Remove working containers of builds that were killed."""
    run("rm", "--all", check=False)


def has(ref: str) -> bool:
    """Whether the store holds an image of that name."""
    return bool(run("images", "--quiet", "--no-trunc", ref, check=False).strip())


def unpack(folder: Path, name: str, config_digest: str, ref: str) -> None:
    """Take the image of that name in an OCI layout into the store, as `ref`, unless it is there."""
    if has(ref):
        return
    with step(f"unpacking {ref} into buildah's store, which has not got it"):
        # buildah makes a name of the path it is given, which a path with hidden folders is not fit for.
        run("pull", "--quiet", f"oci:{folder.name}:{name}", seconds=900, folder=folder.parent)
        run("tag", config_digest.removeprefix("sha256:"), ref)


def environment() -> dict[str, str]:
    """What every buildah runs with: room for large files, and a PATH with the folders of administrators."""
    temporary = files.storage() / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    path = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
    return os.environ | {"TMPDIR": str(temporary), "PATH": path}
