"""A cluster that is ready for TrainingRuns: the embedded one, or one that exists (`--kubeconfig`)."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from devcluster.errors import DevclusterError
from devcluster.install import install
from devcluster.kube import Kubectl
from devcluster.progress import say, step

if TYPE_CHECKING:
    from devcluster.cluster import Cluster

BUCKET = "trainyard"
OPERATOR_SETTINGS = {"TRAINYARD_STATUS_INTERVAL": "1"}
"""People watch this cluster; ten seconds between two looks at the progress are for clusters with a thousand runs."""


@dataclass(frozen=True, slots=True)
class S3Target:
    """Where runs put their checkpoints. The keys go into a Secret and nowhere else."""

    uri: str
    """s3://bucket/prefix"""
    endpoint: str | None
    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"S3Target({self.uri!r}, {self.endpoint!r})"


@dataclass(frozen=True, slots=True)
class Environment:
    """What the demo, the cluster tests and the benches need."""

    kubectl: Kubectl
    trainer_image: str
    s3: S3Target
    cluster: Cluster | None
    """The embedded cluster, None for an existing one."""

    @property
    def kubeconfig(self) -> Path:
        return self.kubectl.kubeconfig


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every verb that needs a cluster."""
    group = parser.add_argument_group("an existing cluster instead of the embedded one")
    group.add_argument(
        "--kubeconfig", type=Path, help="kubeconfig of the cluster (its current context is used)"
    )
    group.add_argument(
        "--operator-image", help="pullable image of the operator (Dockerfile target `operator`)"
    )
    group.add_argument("--trainer-image", help="pullable image of the trainer (Dockerfile target `trainer`)")
    group.add_argument(
        "--s3-uri", help="s3://bucket/prefix for checkpoints; keys from AWS_ACCESS_KEY_ID, ..."
    )
    group.add_argument("--s3-endpoint", help="URL of the S3 server as pods see it, when it is not Amazon's")


def make(args: argparse.Namespace, *, nodes: int = 2) -> Environment:
    """The environment that the flags ask for. Raises DevclusterError that says which flag is missing."""
    if args.kubeconfig is None:
        return embedded(args.name, nodes=nodes)
    return existing(args)


def kubectl_binary() -> Path:
    from devcluster.gotools import build

    return build.ensure("kubectl")["kubectl"]


def embedded(name: str, *, nodes: int = 2) -> Environment:
    """Bring up (or find up) the embedded cluster `name`, with images loaded, S3 running, operator installed."""
    if os.geteuid() != 0:
        raise DevclusterError(
            "the embedded cluster makes network namespaces and containers and needs root: run as root, "
            "or give an existing cluster by --kubeconfig"
        )
    from devcluster.cluster import Cluster
    from devcluster.images.build import build

    cluster = Cluster(name)
    cluster.up(nodes=nodes)
    images = {target: build(target) for target in ("operator", "trainer")}
    for image in images.values():
        cluster.load_image(image.oci_layout, image.ref)
        cluster.load_image(image.oci_layout, f"{image.name}:dev")  # the name that the README's examples use
    s3 = cluster.start_s3()
    s3.make_bucket(BUCKET)
    kubectl = Kubectl(cluster.kubeconfig, kubectl_binary())
    install(kubectl, operator_image=images["operator"].ref, settings=OPERATOR_SETTINGS)
    return Environment(
        kubectl=kubectl,
        trainer_image=images["trainer"].ref,
        s3=S3Target(f"s3://{BUCKET}/runs", s3.endpoint, s3.access_key, s3.secret_key),
        cluster=cluster,
    )


def existing(args: argparse.Namespace) -> Environment:
    """Use the cluster of `--kubeconfig`: install the operator there, touch nothing else."""
    missing = [
        f"--{flag.replace('_', '-')}"
        for flag in ("operator_image", "trainer_image", "s3_uri")
        if not getattr(args, flag)
    ] + [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if not os.environ.get(name)]
    if missing:
        raise DevclusterError(
            f"an existing cluster needs also: {', '.join(missing)} "
            "(its nodes pull the images, its pods reach the S3 server; keys are read from the environment)"
        )
    if not args.kubeconfig.is_file():
        raise DevclusterError(f"--kubeconfig {args.kubeconfig}: no such file")
    kubectl = Kubectl(args.kubeconfig.absolute(), kubectl_binary())
    with step("asking the cluster for its version"):
        say(kubectl("version").strip().replace("\n", ", "))
    install(kubectl, operator_image=args.operator_image, settings=OPERATOR_SETTINGS)
    return Environment(
        kubectl=kubectl,
        trainer_image=args.trainer_image,
        s3=S3Target(
            args.s3_uri,
            args.s3_endpoint,
            os.environ["AWS_ACCESS_KEY_ID"],
            os.environ["AWS_SECRET_ACCESS_KEY"],
        ),
        cluster=None,
    )


def take_down(name: str | None, *, purge: bool) -> None:
    """Remove the embedded cluster `name`, or all of them."""
    from devcluster.cluster import Cluster
    from devcluster.paths import state_root

    names = [name] if name else sorted(p.name for p in state_root().glob("*") if p.is_dir())
    if not names:
        say("no embedded cluster is up")
    for each in names:
        Cluster(each).down(purge=purge)


def credentials_secret(name: str, namespace: str, s3: S3Target) -> str:
    """Manifest of the Secret that `spec.checkpoint.credentialsSecret` names. Only ever piped to kubectl."""
    import yaml

    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key},
        }
    )
