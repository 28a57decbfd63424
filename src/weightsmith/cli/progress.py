"""Progress bars on standard error, one for each task at work; silent when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.runs.progress import Progress


@contextmanager
def bars() -> Iterator[Callable[[str], Progress]]:
    """A maker of `Progress` receivers for the length of one command; it takes what to put before labels."""
    from weightsmith.runs.progress import SILENT

    if not sys.stderr.isatty():
        yield lambda prefix: SILENT
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield lambda prefix: _Bar(shown, prefix)


class _Bar:
    """The bar of one worker: each `start` begins a new one in its place."""

    def __init__(self, shown: Any, prefix: str) -> None:
        self._shown, self._prefix = shown, prefix
        self._task: Any = None

    def start(self, label: str, total: float, unit: str) -> None:
        self.done()
        text = " ".join(filter(None, (self._prefix, label)))
        self._task = self._shown.add_task(text, total=total)

    def advance(self, amount: float) -> None:
        if self._task is not None:
            self._shown.advance(self._task, amount)

    def done(self) -> None:
        if self._task is not None:
            self._shown.remove_task(self._task)
            self._task = None
