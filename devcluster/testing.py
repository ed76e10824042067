"""`./dev test`: lint, then pytest over the levels, with pytest's own summary as the last lines."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from devcluster.progress import say

CHECKOUT = Path(__file__).resolve().parent.parent
LEVELS = ("unit", "control_plane", "trainer", "devcluster", "cluster")
"""In order of cost: a cheap failure is seen first."""
ENVIRONMENTS = ("peers", "savers", "deepspeed", "xla")
"""Of the trainer level: Lightning and Accelerate, DeepSpeed, PyTorch/XLA."""


def main(args: argparse.Namespace) -> int:
    """Exit code of the first thing that failed; the tests run even when lint has findings."""
    levels = args.levels or list(LEVELS)
    unknown = sorted(set(levels) - set(LEVELS))
    if unknown:
        print(f"error: no level {', '.join(unknown)}; there are: {', '.join(LEVELS)}", file=sys.stderr)
        return 2
    lint = 0
    if not args.no_lint and not args.expression:
        from devcluster import linting

        lint = linting.main()
    prepare(levels, existing=args.kubeconfig is not None)
    env = os.environ | _existing(args)
    command = [
        sys.executable, "-m", "pytest", "--durations=15", "-p", "no:cacheprovider",
        *(["-k", args.expression] if args.expression else []),
        *(f"tests/{level}" for level in levels),
    ]  # fmt: skip
    tests = subprocess.call(command, cwd=CHECKOUT, env=env)
    if lint:
        print("./dev test: lint has findings (above)", file=sys.stderr)
    return tests or lint


def prepare(levels: list[str], *, existing: bool) -> None:
    """Install and build what the levels run on, with progress on the screen instead of a silent first test."""
    from devcluster.gotools import build

    tools: set[str] = set()
    if "control_plane" in levels or "devcluster" in levels:
        tools |= {"etcd", "kube-apiserver", "kube-controller-manager", "kubectl"}
    if "trainer" in levels:
        tools |= {"versitygw"}
    if tools:
        build.ensure(*sorted(tools))
    if "trainer" in levels:
        _torchserve()
        _environments()
    if "cluster" in levels and not existing and os.geteuid() == 0:
        from devcluster.images.build import build as build_image

        say("building the images for the cluster level")
        build_image("operator")
        build_image("trainer")


def _torchserve() -> None:
    """Its test is skipped, for the same reason, where it cannot be had."""
    from devcluster import torchserve

    if reason := torchserve.obstacle():
        say(reason)
    else:
        torchserve.ensure()


def _environments() -> None:
    """Those that tests run other libraries in; a test that has none makes it, and says why it cannot."""
    from devcluster import venvs
    from devcluster.errors import DevclusterError

    for name in ENVIRONMENTS:
        try:
            venvs.environment(name)
        except DevclusterError as error:
            say(f"{name}: {error}")


def _existing(args: argparse.Namespace) -> dict[str, str]:
    """How the flags reach tests/cluster/conftest.py."""
    given = {
        "TRAINYARD_TEST_KUBECONFIG": args.kubeconfig and str(args.kubeconfig.absolute()),
        "TRAINYARD_TEST_OPERATOR_IMAGE": args.operator_image,
        "TRAINYARD_TEST_TRAINER_IMAGE": args.trainer_image,
        "TRAINYARD_TEST_S3_URI": args.s3_uri,
        "TRAINYARD_TEST_S3_ENDPOINT": args.s3_endpoint,
    }
    return {k: v for k, v in given.items() if v}
