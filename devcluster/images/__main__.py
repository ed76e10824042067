"""python -m devcluster.images: the container images of the development cluster."""

from __future__ import annotations

import argparse
import json
import sys

from devcluster.errors import DevclusterError
from devcluster.images import base, build, files, inputs, layout, prune, sandbox
from devcluster.progress import say


def main(arguments: list[str] | None = None) -> int:
    """Build, try, list and remove container images; nothing is pushed anywhere."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DevclusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was not whole yet will be made again", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m devcluster.images", description=main.__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("base", help="make the base images that the others stand on (once, minutes)")
    verb.add_argument("kind", nargs="*", help=f"of: {', '.join(base.RECIPES)} (all)")
    verb.add_argument(
        "--refresh", action="store_true", help="make them anew from Debian testing as it is today"
    )
    verb.set_defaults(run=_base)
    verb = verbs.add_parser("build", help="build images of the checkout as it is now")
    verb.add_argument("target", nargs="*", help=f"of: {', '.join(inputs.TARGETS)} (all)")
    verb.set_defaults(run=_build)
    verb = verbs.add_parser(
        "run", help="run a program in an image, without a network: run trainer python3 -V"
    )
    verb.add_argument("target", choices=inputs.TARGETS)
    verb.add_argument("program", nargs=argparse.REMAINDER, help="the program and its arguments")
    verb.set_defaults(run=_run)
    verb = verbs.add_parser("ls", help="list the images in the cache, the most recently used first")
    verb.set_defaults(run=_ls)
    verb = verbs.add_parser("prune", help="remove what the checkout as it is now does not need")
    verb.add_argument("--all", action="store_true", help="remove everything, base images included")
    verb.set_defaults(
        run=lambda options: say(f"{prune.prune(everything=options.all) / 1e6:.0f} MB given back")
    )
    return parser


def _known(names: list[str], known: dict[str, object]) -> list[str]:
    if unknown := set(names) - set(known):
        raise DevclusterError(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return names or list(known)


def _base(options: argparse.Namespace) -> None:
    for kind in _known(options.kind, dict(base.RECIPES)):
        found = None if options.refresh else base.find(kind)
        if found is None:
            with files.exclusive(f"making base image {kind!r}"):
                found = base.ensure(kind, refresh=options.refresh)
        print(f"{found.ref}\t{found.digest}\tpython {found.python}\t{found.folder}")


def _build(options: argparse.Namespace) -> None:
    for target in _known(options.target, dict(inputs.TARGETS)):
        image = build.build(target)
        print(f"{image.ref}\t{image.digest}\t{image.oci_layout}")


def _run(options: argparse.Namespace) -> None:
    if not options.program:
        raise DevclusterError(
            "which program? for example: python -m devcluster.images run trainer python3 -V"
        )
    result = sandbox.run(build.build(options.target), *options.program, seconds=600)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        raise DevclusterError(f"{options.program[0]} exited with {result.returncode}")


def _ls(_: argparse.Namespace) -> None:
    current = {image.oci_layout for target in inputs.TARGETS if (image := build.find(target))}
    for image in build.images():
        content = json.loads(layout.blob(image.oci_layout, image.digest).read_bytes())
        layers = " + ".join(f"{layer['size'] / 1e6:.1f}" for layer in content["layers"])
        mark = "this checkout" if image.oci_layout in current else "another state"
        print(f"{image.ref}\t{image.digest[:19]}\t{layers} MB\t{mark}")


if __name__ == "__main__":
    sys.exit(main())
