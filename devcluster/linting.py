"""`./dev lint`: what must be clean before a commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ["operator", "trainer-image", "devcluster", "tests", "examples", "docs"]


def main(*, fix: bool = False) -> int:
    """0 when everything is clean; runs all checks and reports all findings."""
    folders = [f for f in FOLDERS if any((CHECKOUT / f).rglob("*.py"))]
    ruff = [sys.executable, "-m", "ruff"]
    checks = {
        "ruff": [*ruff, "check", "-q", *(["--fix"] if fix else []), *folders],
        "ruff format": [*ruff, "format", "-q", *([] if fix else ["--check"]), *folders],
        "mypy": [
            sys.executable,
            "-m",
            "mypy",
            "--no-error-summary",
            "-p",
            "trainyard_api",
            "-p",
            "trainyard_operator",
        ],
        "import-linter": [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
    }
    failed = []
    for name, command in checks.items():
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=600)
        print(f"lint: {name}: {'clean' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-8000:], flush=True)
            failed.append(name)
    return 1 if failed else 0
