"""Where code lies and what it may import: rules whose breach would show late, or far away."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("operator", "trainer-image", "devcluster", "docs", "examples", "tests")


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (REPOSITORY / folder).rglob("*.py") if "__pycache__" not in p.parts)


def imported(file: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of a file, wherever in it. A relative one is an error."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield str(node.module), node.lineno


def foreign(folder: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of a folder's modules that are neither of the standard library nor allowed."""
    found = []
    files = modules(folder)
    assert files, f"{folder} is empty"
    for file in files:
        for name, line in imported(file):
            top = name.partition(".")[0]
            fine = top in sys.stdlib_module_names or any(
                name == a or name.startswith(f"{a}.") for a in allowed
            )
            if not fine:
                found.append(f"{file.relative_to(REPOSITORY)}:{line}: imports {name}")
    return found


@pytest.mark.parametrize("folder", ["operator", "trainer-image"])
def test_no_module_directly_in_a_folder_that_is_no_package(folder: str) -> None:
    """`operator/__init__.py` would shadow the standard library's `operator` (docs/decisions/0001-layout.md)."""
    assert not sorted(p.name for p in (REPOSITORY / folder).glob("*.py"))


@pytest.mark.parametrize("folder", CODE)
def test_no_module_is_named_like_one_of_the_standard_library(folder: str) -> None:
    """Run as a script, or with its folder first on sys.path, it would be imported in its place."""
    own = {"__init__", "__main__"}
    # Lightning's import paths, which ported code has; nobody runs a script in these folders.
    ported = {"trainer-image/trainyard/utilities/types.py"}
    names = {
        str(part.relative_to(REPOSITORY))
        for file in modules(folder)
        for part in (file, *file.parents)
        if part.is_relative_to(REPOSITORY / folder) and part != REPOSITORY / folder
        if part.stem in sys.stdlib_module_names and part.stem not in own
    }
    assert not names - ported


def test_the_api_package_needs_nothing() -> None:
    """It is in every image and in the agent, which runs where nothing is installed."""
    assert not foreign("operator/trainyard_api", ("trainyard_api",))


def test_the_plan_is_pure() -> None:
    """It decides; it neither reads nor writes anything, so it imports nothing that could."""
    assert not foreign("operator/trainyard_operator/plan", ("trainyard_api", "trainyard_operator.plan"))
    effects = {
        "asyncio",
        "http",
        "logging",
        "os",
        "pathlib",
        "random",
        "secrets",
        "socket",
        "ssl",
        "subprocess",
        "threading",
        "time",
    }
    for file in modules("operator/trainyard_operator/plan"):
        used = {
            f"{file.name}:{line}: {name}"
            for name, line in imported(file)
            if name.partition(".")[0] in effects
        }
        assert not used


def test_operator_and_trainer_share_only_the_api() -> None:
    for folder, others in {
        "operator": {"trainyard", "trainyard_agent", "torch"},
        "trainer-image": {"trainyard_operator", "kopf", "kubernetes"},
    }.items():
        for file in modules(folder):
            wrong = {name for name, _ in imported(file) if name.partition(".")[0] in others}
            assert not wrong, file
