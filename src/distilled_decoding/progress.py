"""Progress bars with the time left, and stopping cleanly on Ctrl-C or SIGTERM."""

import signal
import sys
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


class Stopped(Exception):  # noqa: N818
    """The user asked to stop; what was finished is on disk."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested."""
        if self.requested:
            raise Stopped


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catch stop requests while the block runs."""
    stop = StopSignal()
    previous = {number: signal.signal(number, stop._handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Bar:
    """One task of a progress display."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total)

    def advance(self, items: int) -> None:
        """Count more items as finished."""
        self._progress.update(self._task, advance=items)

    def at(self, finished: int, description: str | None = None) -> None:
        """Say how many items are finished in all and, optionally, what to show beside the bar."""
        self._progress.update(self._task, completed=finished, description=description)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Bar]:
    """A bar on standard error with the time elapsed and left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        yield Bar(progress, description, total)
