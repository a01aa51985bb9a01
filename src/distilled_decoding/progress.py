"""Progress bars with the time left, and stopping cleanly on Ctrl-C or SIGTERM."""

import os
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

from distilled_decoding.processes import is_first


class Stopped(Exception):  # noqa: N818
    """The user asked to stop; what was finished is kept."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one interrupts at once.

    Attributes:
        requested: whether the user asked to stop.
    """

    def __init__(self, goes_on: bool) -> None:
        self.requested = False
        self._goes_on = goes_on

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if is_first():
            # Straight to the file: a handler may have interrupted a buffered write.
            os.write(2, b"\nstopping after the current step; once more stops at once\n")

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested."""
        if self.requested:
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The exception that ends the run."""
        return Stopped("stopped; the same command goes on" if self._goes_on else "stopped; nothing is kept")


@contextmanager
def stop_signal(goes_on: bool = True) -> Iterator[StopSignal]:
    """Catch stop requests while the block runs; `goes_on` says whether the same call continues a stopped one."""
    stop = StopSignal(goes_on)
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

    def at(self, finished: int) -> None:
        """Say how many items are finished in all."""
        self._progress.update(self._task, completed=finished)

    def say(self, description: str) -> None:
        """Show what is being done."""
        self._progress.update(self._task, description=description)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Bar]:
    """A bar on standard error with the time elapsed and left; of several processes the first shows it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), disable=not is_first()) as progress:
        yield Bar(progress, description, total)
