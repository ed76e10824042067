"""The command that puts a benchmark's results into a page of the documentation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.main import CHECKOUT


def update(
    what: str, description: str | None, page: Path, picture: str,
    render: Callable[[str, dict[str, Any], str], str], plot: Callable[[dict[str, Any], Path], object],
) -> None:  # fmt: skip
    """The command line of `tests.bench.<what>_docs`: `render(page's text, results, link to them)`, and a picture beside it."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help=f"a JSON file of `./dev bench {what}`")
    parser.add_argument("--page", type=Path, default=page)
    args = parser.parse_args()
    result = json.loads(args.results.read_text(encoding="utf-8"))
    if result.get("what") != what:
        parser.error(f"{args.results} is of `./dev bench {result.get('what')}`")
    source = args.results.resolve()
    shown = source.relative_to(CHECKOUT) if source.is_relative_to(CHECKOUT) else Path(source.name)
    args.page.write_text(
        render(args.page.read_text(encoding="utf-8"), result, f"../{shown.as_posix()}"), encoding="utf-8"
    )
    plot(result, args.page.with_name(picture))
