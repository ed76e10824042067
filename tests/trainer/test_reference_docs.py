"""docs/reference is what its generator makes of the docstrings, and the links of all pages of docs lead somewhere."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"])


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generator: ModuleType) -> dict[str, str]:
    rendered: dict[str, str] = generator.render_all()
    return rendered


def test_reference_is_up_to_date(generator: ModuleType, pages: dict[str, str]) -> None:
    committed = {p.name: p.read_text(encoding="utf-8") for p in generator.TARGET.glob("*.md")}
    stale = sorted(name for name in {*committed, *pages} if committed.get(name) != pages.get(name))
    assert not stale, "run: ./dev python docs/generate_reference.py"


def test_another_process_writes_the_same(pages: dict[str, str]) -> None:
    """With other addresses, other hashes, and modules imported in another order."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hashlib, trainyard.strategies.fsdp, generate_reference\n"
        "print(hashlib.sha256(repr(sorted(generate_reference.render_all().items())).encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(DOCS)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == hashlib.sha256(repr(sorted(pages.items())).encode()).hexdigest()


def test_pages_know_no_machine(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        assert not re.search(r" at 0x[0-9a-f]+", text), name
        assert str(REPOSITORY) not in text, name
        assert str(Path.home()) + "/" not in text, name


def test_everything_public_is_described(generator: ModuleType, pages: dict[str, str]) -> None:
    bare = []
    for page in generator.PAGES:
        for name, found in generator.public_of(page).items():
            text = pages[f"{page}.md"].split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]
            prose = re.sub(r"(?s:```.*?```)|<sub>.*?</sub>|(?m:^Bases:.*$)", "", text)
            if len(prose.split()) < 3:
                bare.append(f"{page}.{name}")
            if isinstance(found, type) and found.__module__.startswith("trainyard."):
                assert "<sub>[" in text
    assert not bare, "these have no docstring"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(generator: ModuleType, page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "x", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {generator._anchor(h) for h in headings}, target
