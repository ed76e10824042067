"""Runs a program in an image without Kubernetes: to look into the image, and to test it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.images import buildah, files, layout
from devcluster.images.layout import ImageRef

USER = "65532:65532"
FAILED = 125
"""Exit code when buildah could not even start the program."""

# In a network namespace of its own, with nothing but the loopback in it.
_SCRIPT = """
ip link set lo up || exit {failed}
container=$({buildah} from --pull=never {ref}) || exit {failed}
{buildah} run --isolation=chroot --user={user} {volumes} "$container" -- {program}
code=$?
{buildah} rm "$container" > /dev/null
exit $code
"""


def run(
    image: ImageRef, *program: str, volumes: Mapping[Path, str] | None = None, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a program in the image as the user that pods have; host files of `volumes` are mounted read-only.

    Raises DevclusterError when it does not end in time.
    """
    mounted = [f"--volume={source}:{target}:ro" for source, target in (volumes or {}).items()]
    with files.exclusive(f"running a program in {image.ref}"):
        # The layout is what nodes get: what is tested is unpacked from it, should buildah have forgotten the image.
        config = layout.config_digest(image.oci_layout, image.digest)
        buildah.unpack(image.oci_layout, image.ref, config, image.ref)
        script = _SCRIPT.format(
            buildah=shlex.join(buildah.program()),
            failed=FAILED,
            ref=shlex.quote(image.ref),
            user=USER,
            volumes=shlex.join(mounted),
            program=shlex.join(program),
        )
        try:
            return subprocess.run(
                [*buildah.CONTAINED, "--net", "sh", "-c", script],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                env=buildah.environment(),
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DevclusterError(f"{program} in {image.ref} did not end within {seconds:.0f} s") from None
