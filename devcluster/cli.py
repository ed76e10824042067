"""`./dev`: the verbs that people use. Each verb is one function; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from devcluster.errors import DevclusterError

CHECKOUT = Path(__file__).resolve().parent.parent
PASS_ON = ("status", "logs", "kubectl", "cut", "join", "load-image", "images", "python")
"""Verbs that hand all their words, flags included, to another program."""


def demo(args: argparse.Namespace) -> int:
    from devcluster.demo import main

    return main(args)


def test(args: argparse.Namespace) -> int:
    from devcluster.testing import main

    return main(args)


def bench(args: argparse.Namespace) -> int:
    from tests.bench.main import main

    return main(args)


def up(args: argparse.Namespace) -> int:
    from devcluster.environment import embedded

    env = embedded(args.name, nodes=args.nodes)
    print(f"export KUBECONFIG={env.kubeconfig}")
    return 0


def down(args: argparse.Namespace) -> int:
    from devcluster.environment import take_down

    take_down(args.name, purge=args.purge)
    return 0


def cluster(args: argparse.Namespace) -> int:
    from devcluster.cluster.__main__ import main

    return main([args.verb, "--name", args.name, *args.rest])


def kubectl(args: argparse.Namespace) -> int:
    from devcluster.cluster import Cluster
    from devcluster.environment import kubectl_binary

    config = Cluster(args.name).kubeconfig
    return subprocess.call([kubectl_binary(), f"--kubeconfig={config}", *args.rest])


def images(args: argparse.Namespace) -> int:
    from devcluster.images.__main__ import main

    return main(args.rest)


def lint(args: argparse.Namespace) -> int:
    from devcluster.linting import main

    return main(fix=args.fix)


def lock(_: argparse.Namespace) -> int:
    from devcluster.images.locks import main

    return main([]) or 0


def python(args: argparse.Namespace) -> int:
    return subprocess.call([sys.executable, *args.rest])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./dev",
        description="Trainyard's developer commands. `./dev demo` first; `./dev VERB --help` tells more.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    def on_cluster(sub: argparse.ArgumentParser, default: str = "dev") -> None:
        sub.add_argument(
            "--name", default=default, help="name of the embedded cluster (default: %(default)s)"
        )

    from devcluster.environment import add_cluster_arguments

    p = verb(
        "demo", demo, "Train on a real cluster, kill a worker and a pod, watch the run resume and finish."
    )
    on_cluster(p)
    add_cluster_arguments(p)
    p.add_argument("--nodes", type=int, default=2, help="nodes of the embedded cluster (default: 2)")
    p.add_argument("--step-delay", type=float, default=0.04, help="artificial seconds per step, to watch it")

    p = verb("test", test, "Run the tests: all levels, or those named.")
    p.add_argument("levels", nargs="*", metavar="LEVEL", help="unit control_plane trainer devcluster cluster")
    p.add_argument("-k", dest="expression", help="only tests that match (pytest -k)")
    p.add_argument("--no-lint", action="store_true", help="skip ruff, mypy and import-linter")
    add_cluster_arguments(p)

    p = verb("bench", bench, "Measure; writes tests/bench/results/.")
    p.add_argument(
        "what",
        choices=["recovery", "trainer", "checkpoint", "elastic"],
        help="recovery: seconds after kills; trainer: the library's overhead; checkpoint: stalls, throughput, memory; "
        "elastic: what the same bits at any number of processes cost",
    )
    p.add_argument("--trials", type=int, default=20, help="kills of each kind, or rounds (default: 20)")
    p.add_argument("--out", type=Path, default=CHECKOUT / "tests" / "bench" / "results")
    p.add_argument("--sizes", help="checkpoint: of the state (default: 64M,256M,1G,4G)")
    p.add_argument("--quick", action="store_true", help="checkpoint: everything once, with a tiny state")
    on_cluster(p, "bench")
    add_cluster_arguments(p)

    p = verb("up", up, "Bring up the embedded cluster with images, S3 server and operator.")
    on_cluster(p)
    p.add_argument("--nodes", type=int, default=2)
    p = verb("down", down, "Remove the embedded cluster and all it made.")
    p.add_argument("--name", default=None, help="only this cluster (default: all)")
    p.add_argument("--purge", action="store_true", help="also delete the cached image stores of its nodes")

    for name, text in {
        "status": "Nodes and components of the embedded cluster.",
        "logs": "Log of a component: ./dev logs kube-apiserver",
        "kubectl": "kubectl on the embedded cluster: ./dev kubectl get tr",
        "cut": "Cut a node off the network: ./dev cut node-1",
        "join": "Join a node that was cut off.",
        "load-image": "Load an image (OCI layout) into the nodes.",
    }.items():
        p = verb(name, kubectl if name == "kubectl" else cluster, text)
        on_cluster(p)

    verb("images", images, "Build the operator's and the trainer's image: ./dev images build")
    p = verb("lint", lint, "ruff, mypy, import-linter.")
    p.add_argument("--fix", action="store_true", help="let ruff repair and format")
    verb("lock", lock, "Make locks/*.txt anew from pyproject.toml.")
    verb("python", python, "Python of the environment: ./dev python -m pytest tests/unit")
    return parser


def _arguments(argv: list[str]) -> argparse.Namespace:
    """The flags of ./dev itself, and in `rest` those of the program behind the verb."""
    parser = _parser()
    if argv[0] not in PASS_ON:
        return parser.parse_args(argv)
    # Only `--name CLUSTER` right after the verb is ours: everything else may mean something to the other program.
    ours = 3 if len(argv) > 2 and argv[1] == "--name" else 1
    args = parser.parse_args(argv[:ours])
    args.rest = argv[ours:]
    return args


def main() -> int:
    """Exit code for the shell. Expected errors are one line; Ctrl-C says what stays."""
    argv = sys.argv[1:]
    args = _arguments(["--help"] if argv in ([], ["help"]) else argv)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        return args.run(args)
    except DevclusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `./dev down` removes what is still up", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
