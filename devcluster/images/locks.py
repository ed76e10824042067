"""Keeps locks/*.txt: every version that is installed anywhere, with its files' hashes, and no host's name.

A lock is made from pyproject.toml by `uv pip compile --universal`, so that one file serves every platform
and Python that the project supports. Pins that are there already are kept unless they no longer fit or
`--upgrade` is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from devcluster.errors import DevclusterError
from devcluster.images import uv
from devcluster.images.files import REPOSITORY
from devcluster.progress import say

FOLDER = REPOSITORY / "locks"
OPTIONS = (
    "--universal",
    "--generate-hashes",
    "--no-emit-index-url",
    "--no-annotate",
    "--no-header",
    "--quiet",
)
# Of the trainer's requirements, those that a base image with torch brings itself.
TORCH = ("torch", "numpy")


@dataclasses.dataclass(frozen=True, slots=True)
class Lock:
    """What one lock is for, and how its requirements are found in pyproject.toml."""

    purpose: str
    requirements: Callable[[Mapping[str, Any]], list[str]]
    agrees_with: str | None = None
    """A lock whose pins hold here too, because both are installed into one environment."""


def name_of(requirement: str) -> str:
    """The package's name at the beginning of a requirement."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _extra(project: Mapping[str, Any], name: str) -> list[str]:
    return list(project["project"]["optional-dependencies"][name])


def _group(project: Mapping[str, Any], name: str) -> list[str]:
    return list(project["dependency-groups"][name])


def _everything(project: Mapping[str, Any]) -> list[str]:
    extras = [
        requirement for extra in project["project"]["optional-dependencies"].values() for requirement in extra
    ]
    return [*extras, *(entry for entry in project["dependency-groups"]["dev"] if isinstance(entry, str))]


# In this order: a lock comes after the one that it agrees with.
LOCKS: dict[str, Lock] = {
    "dev": Lock("./dev's environment: all of it, and the tools", _everything),
    "uv": Lock("what ./dev installs the others with", lambda project: ["uv"]),
    "pip": Lock("what the Dockerfile installs with where its base image has no pip", lambda project: ["pip"]),
    "operator": Lock("the operator's image", lambda project: _extra(project, "operator")),
    "torch": Lock(
        "the trainer's image, TORCH=pypi",
        lambda project: [each for each in _extra(project, "trainer") if name_of(each) in TORCH],
    ),
    "trainer": Lock(
        "the trainer's image, torch aside",
        lambda project: [each for each in _extra(project, "trainer") if name_of(each) not in TORCH],
        agrees_with="torch",
    ),
    "examples": Lock("EXTRAS=examples", lambda project: _extra(project, "examples"), agrees_with="torch"),
    "peers": Lock(
        "the libraries that ours is measured against and exchanges checkpoints with",
        lambda project: _group(project, "peers"),
        agrees_with="dev",
    ),
    "savers": Lock(
        "what ./dev bench checkpoint measures, ours and others, in one environment",
        lambda project: _group(project, "savers"),
        agrees_with="torch",
    ),
    "torchserve": Lock(
        "the server that the TorchServe example is tested with (devcluster/venvs.py)",
        lambda project: _group(project, "torchserve"),
        agrees_with="dev",
    ),
    "deepspeed": Lock(
        "the engine that strategy='deepspeed' is tested with",
        lambda project: _group(project, "deepspeed"),
        agrees_with="dev",
    ),
    # With a torch of its own, so it agrees with nothing.
    "xla": Lock("what accelerator='tpu' is tested with", lambda project: _group(project, "xla")),
}


def path(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def compile_lock(name: str, project: Mapping[str, Any], *, arguments: Iterable[str] = ()) -> str:
    """The lock's text as it should be now."""
    lock = LOCKS[name]
    source = "\n".join(lock.requirements(project)) + "\n"
    options = [*OPTIONS, "--python-version", project["project"]["requires-python"].lstrip(">=~"), *arguments]
    if lock.agrees_with:
        options += ["--constraints", str(path(lock.agrees_with))]
    # uv keeps the pins of the file that it is to write, so it writes into the lock's own copy.
    kept = path(name).with_name(f".{name}.txt.new")
    try:
        kept.write_text(path(name).read_text() if path(name).exists() else "")
        uv.run("pip", "compile", "-", *options, "--output-file", kept, stdin=source)
        text = kept.read_text()
    finally:
        kept.unlink(missing_ok=True)
    check_text(name, text)
    return text


def check_text(name: str, text: str) -> None:
    """Raises DevclusterError unless every line is a pin with hashes: no URL, no index, no path."""
    for number, line in enumerate(text.splitlines(), 1):
        if not re.fullmatch(
            r"[A-Za-z0-9._\[\]-]+==[^\s;]+( ;.*)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line
        ):
            raise DevclusterError(
                f"locks/{name}.txt, line {number} is neither a pin nor a hash: {line[:100]!r}"
            )


def pins(text: str) -> dict[str, set[str]]:
    """Versions by package; a package has several where they depend on the platform or the Python."""
    found: dict[str, set[str]] = {}
    for match in re.finditer(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", text, re.MULTILINE):
        found.setdefault(match[1], set()).add(match[2])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Bring locks/*.txt up to date with pyproject.toml."""
    parser = argparse.ArgumentParser(prog="python -m devcluster.images.locks", description=main.__doc__)
    parser.add_argument(
        "lock",
        nargs="*",
        help="which of: " + "; ".join(f"{name} ({lock.purpose})" for name, lock in LOCKS.items()),
    )
    parser.add_argument(
        "--upgrade", action="store_true", help="take the newest versions that fit, not those at hand"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a lock is out of date"
    )
    parser.add_argument(
        "--torch-backend", help="for the lock `torch`: cpu, cu126, rocm6.4, ... (see uv's documentation)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.lock) - set(LOCKS):
        parser.error(f"unknown locks {sorted(unknown)}: choose from {', '.join(LOCKS)}")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    stale = False
    try:
        for name in [name for name in LOCKS if name in options.lock or not options.lock]:
            extra = ["--upgrade"] if options.upgrade else []
            if options.torch_backend and name == "torch":
                extra += ["--torch-backend", options.torch_backend]
            stale |= _update(name, project, extra, write=not options.check)
    except DevclusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(stale and options.check)


def _update(name: str, project: Mapping[str, Any], arguments: list[str], *, write: bool) -> bool:
    old = path(name).read_text() if path(name).exists() else ""
    new = compile_lock(name, project, arguments=arguments)
    if new == old:
        say(f"locks/{name}.txt is up to date ({len(pins(new))} packages)")
        return False
    say(f"locks/{name}.txt " + ("changed:" if write else "is out of date:"))
    for line in difflib.unified_diff(_lines(old), _lines(new), lineterm="", n=0):
        if line[:1] in "+-" and line[:3] not in {"+++", "---"}:
            print(f"  {line}")
    if write:
        path(name).write_text(new)
    return True


def _lines(text: str) -> list[str]:
    return [
        f"{name} {version}" for name, versions in sorted(pins(text).items()) for version in sorted(versions)
    ]


if __name__ == "__main__":
    sys.exit(main())
