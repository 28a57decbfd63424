"""The family trees of a run's checkpoints, read from their lineage files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.reports.folder import Run

if TYPE_CHECKING:
    from weightsmith.checkpoints import Lineage


_TELLING = ("data", "replay", "steps", "learning_rate")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One checkpoint in a tree.

    Attributes:
        name: As its child's lineage names it: the stage that made it, a folder, a hub id.
        role: What it was to its child: `base`, `model`; empty for the root.
        method: How it was made; empty for a checkpoint without a lineage (it came from outside).
        parameters: The method's telling options, for print.
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
    """Options for print: of a training the few that tell it from others, of a merge all but its models."""
    brief = [key for key in _TELLING if key in parameters]
    for key in brief or parameters:
        value = parameters[key]
        # What is off (0, false, empty) would only hide what is on.
        if value and key != "models":
            listed = value if isinstance(value, list) else [value]
            yield " ".join([key, *(_word(item) for item in listed)])


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("source") or value.get("value") or f"({len(value)} settings)")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _short(fingerprint: str) -> str:
    kind, _, digest = fingerprint.rpartition(":")
    return f"{kind}:{digest[:10]}" if kind else digest[:10]
