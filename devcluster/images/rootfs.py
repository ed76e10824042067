"""Makes a root file system of Debian's testing suite, signed, trimmed, and tried out before anyone uses it.

Debian testing, because it alone has a torch that is new enough (CVE-2026-24747 is fixed in 2.10) as a
package, with the CPU backend and gloo only, in a few hundred megabytes.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.images import buildah, mirror
from devcluster.progress import say, step, tail

SUITE = "testing"
# debootstrap of an older Debian has no script of the release's name; they all are links to sid's.
SCRIPT = "sid"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SITE = Path(__file__).with_name("libuv_off.py")


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """What a base image holds, and a program that it must be able to run."""

    packages: tuple[str, ...]
    smoke: str
    minutes: float
    """About how long it takes to make, on two cores."""
    without_libuv: bool = False


# Relative to the root; what a container never reads. Directories go with all that is in them.
TRIM = (
    "var/cache/apt/*",
    "var/cache/debconf/*",
    "var/lib/apt/lists/*",
    "var/log/*",
    "tmp/*",
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/info/*",
    "usr/share/locale/*",
    "usr/share/lintian/*",
    "usr/share/bash-completion/*",
    "usr/share/X11/*",
    # Tests of libtorch in C++ (of torch/bin only torch_shm_manager is none), and of Python packages.
    "usr/lib/libtorch-test",
    "usr/lib/python3/dist-packages/torch/bin/*[!r]",
    "usr/lib/python3/dist-packages/**/tests",
    # Open MPI's UCX has plugins for AMD's and Intel's accelerators, which bring 250 MB of compilers along.
    "usr/lib/llvm-*",
    "usr/lib/*/libLLVM*",
    "usr/lib/*/libamd*",
    "usr/lib/*/libhsa*",
    "usr/lib/*/libze*",
    "usr/lib/*/ucx/*rocm*",
    "usr/lib/*/ucx/*ze.*",
)
# proc and dev are mounted for the program only, in the mount namespace which it is started in.
_ENTER = 'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && cd / && exec chroot "$@"'


def make(root: Path, recipe: Recipe, log: Path) -> None:
    """Fill an empty folder with the root file system. Raises DevclusterError with the end of the log."""
    source = mirror.find()
    if not KEYRING.exists():
        raise DevclusterError(
            f"{KEYRING} is missing (package debian-archive-keyring): Debian's signatures cannot be checked"
        )
    what = f"debootstrap of Debian {SUITE} with {', '.join(recipe.packages)}"
    with step(f"{what} (about {recipe.minutes:g} min, once)"):
        _debootstrap(root, recipe, source, log)
    if recipe.without_libuv:
        _install_site(root)
    _trim(root)
    with step("trying the base image out"):
        said = run_inside(root, "python3", "-c", recipe.smoke)
    say(f"base image works: {said.strip()}")


def _debootstrap(root: Path, recipe: Recipe, source: str, log: Path) -> None:
    options = [
        "--variant=minbase",
        "--force-check-gpg",
        f"--keyring={KEYRING}",
        f"--include={','.join(recipe.packages)}",
    ]
    command = [*buildah.CONTAINED, "debootstrap", *options, SUITE, str(root), source, SCRIPT]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=mirror.environment(),
                timeout=1500,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise DevclusterError(f"debootstrap did not end within 25 minutes{tail(log)}") from None
    if code != 0:
        raise DevclusterError(f"debootstrap exited with {code}{tail(log)}")


def _install_site(root: Path) -> None:
    """Put our sitecustomize in the place of Debian's, which only looks for a crash reporter."""
    found = list(root.glob("usr/lib/python3.[0-9]*"))
    if len(found) != 1:
        raise DevclusterError(f"Debian's layout has changed: {len(found)} folders usr/lib/python3.*, not one")
    site = found[0] / "sitecustomize.py"
    # Debian's is a symbolic link, not to be written through: it is absolute, and leads to the host's /etc.
    site.unlink(missing_ok=True)
    shutil.copyfile(SITE, site)
    site.chmod(0o644)
    run_inside(root, "python3", "-m", "compileall", "-q", f"/{site.relative_to(root)}")


def _trim(root: Path) -> None:
    for pattern in TRIM:
        for path in list(root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def run_inside(root: Path, *command: str) -> str:
    """Run a program with the root file system as its root, and return what it printed."""
    result = subprocess.run(
        [*buildah.CONTAINED, "sh", "-c", _ENTER, "enter", str(root), *command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/",
            "LANG": "C.UTF-8",
        },
        timeout=300,
        check=False,
    )
    if result.returncode != 0:
        raise DevclusterError(
            f"{command[0]} in the base image exited with {result.returncode}: {result.stderr.strip()[-2000:]}"
        )
    return result.stdout
