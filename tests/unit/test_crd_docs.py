"""docs/api.md is what its generator makes of the CRD."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_reference_is_up_to_date(generator: ModuleType) -> None:
    crd = yaml.safe_load(generator.CRD.read_text(encoding="utf-8"))
    committed = (DOCS / "api.md").read_text(encoding="utf-8")
    assert committed == generator.render(crd), "run: python docs/generate_api.py"


def test_links_within_the_page_lead_somewhere(generator: ModuleType) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    anchors = {generator._anchor(h) for h in re.findall(r"^## (.+)$", page, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert len(links) > 30
    assert links <= anchors
