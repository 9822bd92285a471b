"""What goes to the terminal: tables, progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wush_jax.calibrate import Progress as Callback


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
def progress() -> Iterator[Callback]:
    """Show a bar, beside the results, for what the library reports: done, total, what."""
    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("start", total=None)

        def update(done: int, total: int | None, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield update
