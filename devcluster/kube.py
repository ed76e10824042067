"""kubectl, as a person would use it: what works here works for users."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.errors import DevclusterError


@dataclass(frozen=True, slots=True)
class Kubectl:
    """Runs kubectl with one kubeconfig. Raises DevclusterError with kubectl's own words."""

    kubeconfig: Path
    binary: Path

    def __call__(self, *args: str, stdin: str | None = None, seconds: float = 60) -> str:
        """Standard output of `kubectl args`."""
        command = [str(self.binary), f"--kubeconfig={self.kubeconfig}", *args]
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            raise DevclusterError(f"kubectl {' '.join(args)}: no answer within {seconds:.0f} s") from None
        if done.returncode:
            raise DevclusterError(f"kubectl {' '.join(args)}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def json(self, *args: str) -> Any:
        """The object (or list) that `kubectl get args` shows."""
        return json.loads(self("get", *args, "-o", "json"))

    def find(self, *args: str) -> Any | None:
        """As `json`, None when there is no such object."""
        out = self("get", *args, "-o", "json", "--ignore-not-found")
        return json.loads(out) if out.strip() else None

    def apply(self, manifest: str | Path, *args: str) -> str:
        """Apply a text or a file."""
        if isinstance(manifest, Path):
            return self("apply", "-f", str(manifest), *args)
        return self("apply", "-f", "-", *args, stdin=manifest)

    def wait(
        self,
        what: str,
        ready: Callable[[], bool],
        *,
        seconds: float,
        explain: Callable[[], str] = lambda: "",
        every: float = 0.25,
    ) -> None:
        """Poll until ready; at the bound say what it waited for, and `explain()`."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise DevclusterError(f"{what}: not so after {seconds:.0f} s, giving up\n{explain()}")
            time.sleep(every)
