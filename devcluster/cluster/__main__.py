"""The command line: python -m devcluster.cluster VERB."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from devcluster.cluster.lifecycle import Cluster
from devcluster.cluster.registry import leftovers
from devcluster.errors import DevclusterError
from devcluster.gotools import build
from devcluster.proc import CommandError, environment


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="dev", help="the cluster's name (default: dev)")
    about = "A real Kubernetes cluster on this machine."
    parser = argparse.ArgumentParser(prog="python -m devcluster.cluster", description=about)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, parents=[common])

    up = verb("up", "bring the cluster up, or mend it")
    up.add_argument("--nodes", type=int, default=2, help="at least so many (default: 2)")
    down = verb("down", "remove the cluster")
    down.add_argument("--purge", action="store_true", help="remove its nodes' image stores too")
    verb("status", "say what of it runs")
    load = verb("load-image", "bring an image from an OCI layout folder to the nodes")
    load.add_argument("path", type=Path, help="the folder with index.json and blobs")
    load.add_argument("ref", help="the image's name in the cluster, such as trainyard.local/operator:dev")
    load.add_argument("--node", action="append", help="only to this node (may be repeated)")
    logs = verb("logs", "print a component's log, or list the components")
    logs.add_argument("component", nargs="?")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing")
    for name, text in {
        "cut": "pull a node's cable",
        "join": "plug a node's cable in again",
        "kill-node": "kill everything on a node; up brings it back",
        "restart-kubelet": "kill and restart a node's kubelet",
    }.items():
        verb(name, text).add_argument("node", help="node-1, node-2, ...")
    s3 = verb("s3", "start the cluster's S3 server and print how to reach it")
    s3.add_argument("--bucket", action="append", default=[], help="make this bucket (may be repeated)")
    verb("leftovers", "list what is left on this machine of clusters that are gone")
    # Its arguments are kubectl's own: they are taken as they are, before argparse sees them.
    verb("kubectl", "run kubectl as administrator: kubectl [--name NAME] ARGUMENTS")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments say; errors meant for people come without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["kubectl"] and words[1:2] not in (["-h"], ["--help"]):
            return _kubectl(words[1:])
        return _run(_parser().parse_args(words))
    except (DevclusterError, CommandError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: up goes on from here, down cleans up", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    cluster = Cluster(options.name)
    match options.verb:
        case "up":
            cluster.up(options.nodes)
            print(f"export KUBECONFIG={cluster.kubeconfig}")
        case "down":
            cluster.down(purge=options.purge)
        case "status":
            return _status(cluster)
        case "load-image":
            for node, sent in cluster.load_image(options.path, options.ref, options.node).items():
                print(f"{node}: {'had it already' if sent is None else f'{sent / 1e6:.1f} MB sent'}")
        case "logs":
            return _logs(cluster, options.component, follow=options.follow)
        case "cut":
            cluster.cut(options.node)
        case "join":
            cluster.join(options.node)
        case "kill-node":
            cluster.kill_node(options.node)
        case "restart-kubelet":
            cluster.restart_kubelet(options.node)
        case "s3":
            access = cluster.start_s3()
            for bucket in options.bucket:
                access.make_bucket(bucket)
            for key, value in access.environment.items():
                print(f"export {key}={value}")
        case "leftovers":
            print("\n".join(found := leftovers()) or "nothing")
            return 1 if found else 0
    return 0


def _status(cluster: Cluster) -> int:
    status = cluster.status()
    print(f"cluster    {status.name} at {status.server}\nkubeconfig {status.kubeconfig}")
    for name, running in status.components.items():
        print(f"  {'running' if running else 'DEAD':8} {name}")
    for name, condition in status.nodes.items():
        print(f"  {condition:8} {name}")
    if status.s3:
        print(f"s3         {status.s3.endpoint}")
    return 0 if status.healthy else 1


def _logs(cluster: Cluster, component: str | None, *, follow: bool) -> int:
    if component is None:
        print("\n".join(cluster.status().components))
        return 0
    command = ["tail", "-n", "+1", *(["-f"] if follow else []), str(cluster.logs(component))]
    return subprocess.run(command, check=False).returncode


def _kubectl(words: list[str]) -> int:
    name = "dev"
    if words[:1] == ["--name"] and len(words) > 1:
        name, words = words[1], words[2:]
    kubectl = str(build.ensure("kubectl")["kubectl"])
    # It becomes kubectl, so that exec -it and Ctrl-C work as ever.
    os.execve(kubectl, [kubectl, *words], environment({"KUBECONFIG": str(Cluster(name).kubeconfig)}))  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
