"""How long work reports on itself: three calls that a command line, a queue or nothing at all can answer."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receiver of one task's progress at a time; `start` begins the next task."""

    def start(self, label: str, total: float, unit: str) -> None:
        """Begin `label`, which is `total` units long (`unit`: "B", "steps", "tensors", ...)."""

    def advance(self, amount: float) -> None:
        """`amount` more units are done."""

    def done(self) -> None:
        """The task is finished, whatever the units say."""


class _Silent:
    def start(self, label: str, total: float, unit: str) -> None:
        pass

    def advance(self, amount: float) -> None:
        pass

    def done(self) -> None:
        pass


SILENT: Progress = _Silent()
"""Reports to nobody."""
