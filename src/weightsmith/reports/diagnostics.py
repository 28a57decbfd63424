"""Per-layer diagnostics of the merges, as heat strips."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.reports.folder import Run
from weightsmith.reports.strips import Strip


@dataclass(frozen=True, kw_only=True)
class Group:
    """Strips that several merges share, because they merge the same models."""

    stages: tuple[str, ...]
    strips: tuple[Strip, ...]


def merge_diagnostics(run: Run) -> list[Group]:
    """TODO."""
    return []
