"""Progress for people: bars in a terminal, lines where nobody redraws a screen. rich and tqdm are imported when used."""

from trainyard.callbacks.progress.choice import default_progress_bar
from trainyard.callbacks.progress.printer import ProgressPrinter
from trainyard.callbacks.progress.progress_bar import ProgressBar
from trainyard.callbacks.progress.rich_progress import RichProgressBar, RichProgressBarTheme
from trainyard.callbacks.progress.tqdm_progress import TQDMProgressBar

__all__ = [
    "ProgressBar",
    "ProgressPrinter",
    "RichProgressBar",
    "RichProgressBarTheme",
    "TQDMProgressBar",
    "default_progress_bar",
]
