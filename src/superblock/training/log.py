"""What a run says: a progress bar on a terminal, plain lines otherwise, nothing from any process but the first."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Log:
    """Lines and progress on stdout.

    Args:
        quiet: say nothing.
        every: without a terminal, how many steps there are between two lines of progress.
    """

    def __init__(self, quiet: bool = False, every: int = 10) -> None:
        self.quiet, self.every = quiet, every
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
        self.status = ""

    def line(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            self.console.print(text)
            self.console.file.flush()

    def track(self, items: Iterable[Item], header: str, steps: int, images: int) -> Iterator[Item]:
        """The items, with progress shown beside ``header``: ``images`` is how many an item stands for.

        What is in ``status`` is shown along.
        """
        self.status = ""
        if self.quiet:
            yield from items
        elif self.console.is_terminal:
            yield from self._bar(items, header, steps, images)
        else:
            yield from self._lines(items, header, steps, images)

    def _bar(self, items: Iterable[Item], header: str, steps: int, images: int) -> Iterator[Item]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(header, total=steps, rate=0.0, status="")
            start = time.perf_counter()
            for done, item in enumerate(items, 1):
                yield item
                rate = done * images / (time.perf_counter() - start)
                progress.update(task, completed=done, rate=rate, status=self.status)

    def _lines(self, items: Iterable[Item], header: str, steps: int, images: int) -> Iterator[Item]:
        start = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            if done % self.every == 0 or done == steps:
                seconds = time.perf_counter() - start
                left = duration(seconds / done * (steps - done))
                rate = done * images / max(seconds, 1e-9)
                self.line(f"{header} [{done}/{steps}]  {rate:.0f} images/s  left {left}  {self.status}".rstrip())


def duration(seconds: float) -> str:
    """``H:MM:SS``."""
    return str(datetime.timedelta(seconds=int(seconds)))
