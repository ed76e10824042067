"""Which progress a script gets that asks for none in particular."""

from __future__ import annotations

import os
import sys

from trainyard.callbacks.progress.printer import ProgressPrinter
from trainyard.callbacks.progress.progress_bar import ProgressBar
from trainyard.callbacks.progress.rich_progress import RichProgressBar
from trainyard.callbacks.progress.tqdm_progress import TQDMProgressBar
from trainyard.utilities.optional import has


def default_progress_bar() -> ProgressBar:
    """In a terminal rich's bar if it is installed, else tqdm's; lines everywhere else (pods, CI, files)."""
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return ProgressPrinter()
    if has("rich"):
        return RichProgressBar()
    return TQDMProgressBar() if has("tqdm") else ProgressPrinter()
