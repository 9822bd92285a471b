"""What goes to the terminal: tables, progress; and what comes from it: an interruption."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wush_jax.calibration.observe import Progress as Callback


def console() -> Console:
    """Return where results go: as wide as the terminal; in a file or a pipe tables stay whole.

    As text, in a notebook as well.
    """
    plain = Console(force_jupyter=False)
    return plain if plain.is_terminal else Console(width=200, force_jupyter=False)


def progress_bar(console: Console, counts: ProgressColumn | None = None) -> Progress:
    """Return a bar with counts, elapsed time and an ETA."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        counts or MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,  # seconds: a step may take minutes
    )


class Bar:
    """What the library calls with done, total and what: moves a bar, by cost where that is known.

    Args:
      bar: of `progress_bar`.
      total: of what does not tell its own.
      pressed: set by an interruption.
    """

    def __init__(self, bar: Progress, total: int | None, pressed: threading.Event):
        self.bar, self.pressed = bar, pressed
        self.task = bar.add_task("start", total=total, count="")
        self.ends: list[float] = []

    def weigh(self, costs: Sequence[float]) -> None:
        """Note what each step costs: the bar, and the time left, go by that."""
        self.ends = [0.0, *itertools.accumulate(costs)]

    def __call__(self, done: int, of: int | None, what: str) -> None:
        """Show what is done; KeyboardInterrupt on an interruption."""
        if self.pressed.is_set():
            raise KeyboardInterrupt
        total: float | None = self.bar.tasks[self.task].total if of is None else of
        count = f"{done}" if total is None else f"{done}/{total:.0f}"
        part, whole = (self.ends[done], self.ends[-1]) if self.ends else (done, total)
        self.bar.update(self.task, completed=part, total=whole, description=what, count=count)


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Show what the library warns of as the command shows what is wrong: without its source."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UserWarning):
                print(f"wush: warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = cast(Any, show)
        yield


@contextmanager
def progress(total: int | None = None) -> Iterator[Callback]:
    """Show a bar, beside the results, for what the library reports: done, total, what.

    Args:
      total: of what does not tell its own.

    Raises:
      KeyboardInterrupt: on an interruption, at the latest with the next report.
    """
    shown, counts = Console(stderr=True, force_jupyter=False), TextColumn("{task.fields[count]}")
    with _noted_interruption() as pressed, progress_bar(shown, counts) as bar:
        yield Bar(bar, total, pressed)


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
