"""Builds the development cluster's Go programs, once for each set of pins.

A program is looked up in a cache folder named after the go.mod and go.sum that pin it and the Go that builds it, so a
changed pin builds anew and an unchanged one costs nothing. Builds appear under their final name by a rename: an
interrupted build leaves no half program.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

from devcluster.errors import DevclusterError
from devcluster.filelock import locked
from devcluster.gotools import toolchain
from devcluster.paths import cache_root
from devcluster.progress import say

HERE = Path(__file__).parent
KUBERNETES = "1.35.4"
_MAJOR, _MINOR, _ = KUBERNETES.split(".")
_VERSION_PACKAGE = "k8s.io/component-base/version"
# The components would otherwise call themselves v0.0.0-master+$Format:%H$, and clients do compare versions.
_KUBERNETES_FLAGS = " ".join(
    f"-X {_VERSION_PACKAGE}.{key}={value}"
    for key, value in {
        "gitVersion": f"v{KUBERNETES}",
        "gitMajor": _MAJOR,
        "gitMinor": _MINOR,
        "gitTreeState": "clean",
        "gitCommit": "0000000000000000000000000000000000000000",
        "buildDate": "1970-01-01T00:00:00Z",
    }.items()
)


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """One program: the module folder that pins it, its package, and about how long it takes from nothing."""

    module: str
    package: str
    minutes: float
    ldflags: str = ""


def _kubernetes(name: str, minutes: float) -> Tool:
    return Tool("kubernetes", f"k8s.io/kubernetes/cmd/{name}", minutes, _KUBERNETES_FLAGS)


# In the order in which they are best built: what they share is compiled once. Minutes are for two cores.
TOOLS: dict[str, Tool] = {
    "etcd": Tool("kubernetes", "go.etcd.io/etcd/server/v3", 1),
    "kube-apiserver": _kubernetes("kube-apiserver", 4),
    "kube-controller-manager": _kubernetes("kube-controller-manager", 1.5),
    "kubectl": _kubernetes("kubectl", 0.5),
    "kubelet": _kubernetes("kubelet", 2),
    "kube-scheduler": _kubernetes("kube-scheduler", 0.5),
    "kube-proxy": _kubernetes("kube-proxy", 0.5),
    "coredns": Tool("coredns", "github.com/coredns/coredns", 2),
    "versitygw": Tool("versitygw", "github.com/versity/versitygw/cmd/versitygw", 1.5),
    "pause": Tool("pause", "trainyard.dev/devcluster/gotools/pause", 0.1),
}
# What controller-runtime's envtest ships: a machine that has those need not build them.
_ENVTEST = ("etcd", "kube-apiserver", "kubectl")


def ensure(*names: str) -> dict[str, Path]:
    """The paths of the programs named, of all when none is named, built first where they are missing."""
    wanted = [name for name in TOOLS if name in names or not names]
    if unknown := set(names) - set(TOOLS):
        raise ValueError(f"unknown tools {sorted(unknown)}: choose from {', '.join(TOOLS)}")
    found = {name: path for name in wanted if (path := _prebuilt(name))}
    if missing := [name for name in wanted if name not in found]:
        go = toolchain.find()
        found |= {name: path for name in missing if (path := _cached(name, go[1] if go else None))}
        if missing := [name for name in missing if name not in found]:
            found |= _build_all(missing)
    return {name: found[name] for name in wanted}


def _prebuilt(name: str) -> Path | None:
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets or name not in _ENVTEST:
        return None
    path = Path(assets) / name
    return path if os.access(path, os.X_OK) else None


def pins(module: str) -> str:
    """A short hash of everything that decides what a module's programs are, the Go version aside."""
    digest = hashlib.sha256()
    for path in sorted((HERE / module).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr([tool for tool in TOOLS.values() if tool.module == module]).encode())
    return digest.hexdigest()[:12]


def _folder(module: str, version: str) -> str:
    return f"{module}-{pins(module)}-{version}"


def _bin(module: str, version: str) -> Path:
    return cache_root() / "gotools" / _folder(module, version) / "bin"


def _cached(name: str, version: str | None) -> Path | None:
    """A program built before; on a machine without Go any version of Go will have done."""
    module = TOOLS[name].module
    folders = sorted((cache_root() / "gotools").glob(f"{_folder(module, version or '*')}/bin"))
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _build_all(missing: list[str]) -> dict[str, Path]:
    with locked(cache_root() / "gotools.lock", "building Go programs", seconds=3600):
        go, version = toolchain.ensure()
        found: dict[str, Path] = {}
        for number, name in enumerate(missing, 1):
            target = _bin(TOOLS[name].module, version) / name
            if not target.exists():
                _build(name, target, go, f"{number} of {len(missing)}")
            found[name] = target
        return found


def _build(name: str, target: Path, go: str, position: str) -> None:
    tool = TOOLS[name]
    say(
        f"building {name} ({position}) because no build of the pinned version is in {target.parent}: "
        f"up to {tool.minutes:g} min from nothing on two cores, seconds when Go's cache is warm"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{name}.partial")
    flags = ["-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags", f"-s -w {tool.ldflags}".strip()]
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}
    begin = time.monotonic()
    try:
        # A Go build that a Ctrl-C reaches stops by itself; the partial file is overwritten next time.
        subprocess.run(
            [go, "build", *flags, "-o", str(partial), tool.package],
            cwd=HERE / tool.module,
            env=environment,
            check=True,
            timeout=3000,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as error:
        raise DevclusterError(
            f"building {name} failed (go build exited with {error.returncode}): see above"
        ) from None
    except subprocess.TimeoutExpired:
        raise DevclusterError(f"building {name} did not end within 50 minutes") from None
    partial.replace(target)
    say(f"built {name} in {time.monotonic() - begin:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    """Build the programs named, or all, and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m devcluster.gotools.build", description=main.__doc__)
    parser.add_argument("tool", nargs="*", help=f"of: {', '.join(TOOLS)}")
    try:
        for name, path in ensure(*parser.parse_args(arguments).tool).items():
            print(f"{name}\t{path}")
    except (DevclusterError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
