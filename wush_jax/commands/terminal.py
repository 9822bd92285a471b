"""What goes to the terminal: tables, progress; and what comes from it: an interruption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wush_jax.calibration.observe import Progress as Callback


def console() -> Console:
    """Return where results go: as wide as the terminal; in a file or a pipe tables stay whole."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=200)


def progress_bar(console: Console) -> Progress:
    """Return a bar with counts, elapsed time and an ETA."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def progress(total: int | None = None) -> Iterator[Callback]:
    """Show a bar, beside the results, for what the library reports: done, total, what.

    Args:
      total: of what does not tell its own.

    Raises:
      KeyboardInterrupt: on an interruption, at the latest with the next report.
    """
    with _noted_interruption() as pressed, progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("start", total=total)

        def update(done: int, of: int | None, what: str) -> None:
            if pressed.is_set():
                raise KeyboardInterrupt
            bar.update(task, completed=done, total=total if of is None else of, description=what)

        yield update


@contextmanager
def _noted_interruption() -> Iterator[threading.Event]:
    """Note a Ctrl-C: Python drops its exception where it falls into a callback of the collector."""
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
