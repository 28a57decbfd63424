"""The family trees of a run's checkpoints, read from their lineage files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.reports.folder import Run

if TYPE_CHECKING:
    from weightsmith.checkpoints import Lineage


@dataclass(frozen=True, kw_only=True)
class Member:
    """One checkpoint in a tree.

    Attributes:
        name: As its child's lineage names it: the stage that made it, a folder, a hub id.
        role: What it was to its child: `base`, `model`; empty for the root.
        method: How it was made; empty for a checkpoint without a lineage (it came from outside).
        parameters: The method's options, for print.
        fingerprint: Of its content, shortened.
        parents: What it was made from; empty when the page has shown them before.
        shown: The same checkpoint is spelled out further up the page.
    """

    name: str
    role: str
    method: str
    parameters: str
    fingerprint: str
    parents: tuple[Member, ...]
    shown: bool = False


def family_trees(run: Run) -> list[Member]:
    """A tree for each checkpoint that no other one was made from; all others stand inside these."""
    read = {model for stage in run.stages if stage.kind != "evaluate" for model in stage.reads}
    seen: set[str] = set()
    return [
        _grow(stage.name, "", "", stage.lineage, seen)
        for stage in run.stages
        if stage.name not in read and stage.lineage
    ]


def _grow(name: str, role: str, fingerprint: str, lineage: Lineage | None, seen: set[str]) -> Member:
    shown = bool(fingerprint) and fingerprint in seen
    seen.add(fingerprint)
    parents = lineage.inputs if lineage and not shown else ()
    return Member(
        name=name,
        role=role,
        method=lineage.method if lineage else "",
        parameters=", ".join(_options(lineage.parameters)) if lineage else "",
        fingerprint=_short(fingerprint),
        parents=tuple(
            _grow(parent.name, parent.role, parent.fingerprint, parent.lineage, seen) for parent in parents
        ),
        shown=shown,
    )


def _options(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Options for print; nested settings are counted, not spelled out: the recipe above has them."""
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            yield f"{key}: {len(value)} settings"
        elif isinstance(value, list | tuple):
            yield f"{key} {' '.join(map(str, value))}" if len(value) <= 6 else f"{key}: {len(value)} values"
        elif value is not None:
            yield f"{key} {value}"


def _short(fingerprint: str) -> str:
    kind, _, digest = fingerprint.rpartition(":")
    return f"{kind}:{digest[:10]}" if kind else digest[:10]
