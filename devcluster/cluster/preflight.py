"""What this machine must have before a cluster is begun; each refusal says what to do about it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from devcluster import debian
from devcluster.cluster import cgroups, nodeconfig
from devcluster.errors import DevclusterError
from devcluster.paths import cache_root, state_root
from devcluster.proc import run

_HIDDEN = ("/run", "/var/lib", "/var/log")
_GIB = 1 << 30


def require_root() -> None:
    """Refuse anybody else."""
    if os.geteuid() != 0:
        raise DevclusterError(
            "not root: nodes are network and mount namespaces with containers in them. Run it with sudo -E, "
            "or use a cluster that exists already with --kubeconfig"
        )


def check() -> None:
    """Install what can be installed; refuse what cannot be mended."""
    require_root()
    for what, folder in (("TRAINYARD_CACHE", cache_root()), ("TRAINYARD_STATE", state_root())):
        if any(folder.resolve().is_relative_to(hidden) for hidden in _HIDDEN):
            raise DevclusterError(
                f"{what} is {folder}, but nodes have their own {', '.join(_HIDDEN)}: choose another place"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < 2 * _GIB:
            raise DevclusterError(
                f"only {free / _GIB:.1f} GiB are free on the disk of {folder}: make that 2 at least"
            )
    debian.ensure(debian.NODE)
    _check_kernel()


def _check_kernel() -> None:
    cgroups.hierarchies()
    run("modprobe", "-qa", "overlay", "veth", "bridge", "nf_tables", check=False) if shutil.which(
        "modprobe"
    ) else None
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        raise DevclusterError(
            "this kernel has no overlayfs, which containers' file systems need: modprobe overlay failed"
        )
    if run("nft", "list", "tables", check=False).returncode != 0:
        raise DevclusterError("this kernel has no nftables, which Services need: modprobe nf_tables failed")
    if not Path(nodeconfig.CNI_PLUGINS, "ptp").exists():
        raise DevclusterError(
            f"no CNI plugins in {nodeconfig.CNI_PLUGINS}: install containernetworking-plugins"
        )
