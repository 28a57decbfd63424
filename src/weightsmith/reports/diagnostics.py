"""Per-layer diagnostics of the merges, as heat strips.

Merges of the same models share what only the models decide (distance, conflict, cosine); what a method
decides (ranks, weights) is shown for each merge, in a sentence where it is the same everywhere.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.reports.folder import Run
from weightsmith.reports.strips import Strip

# Beyond this many models the cosines of all pairs are replaced by each model's mean over the others.
MOST_PAIRED = 4


@dataclass(frozen=True, kw_only=True)
class Group:
    """Strips of merges of the same models; `title` names the models, `merges` the stages."""

    title: str
    merges: tuple[str, ...]
    strips: tuple[Strip, ...]
    notes: tuple[str, ...]


def merge_diagnostics(run: Run) -> list[Group]:
    """One group for each set of models that was merged and measured."""
    found = [(stage, stage.diagnostics) for stage in run.stages]
    known = [(stage, record) for stage, record in found if record and record.get("models")]
    based = {tuple(record["models"]) for _, record in known if record["reference"] == "base"}
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for stage, record in known:
        # An average knows no base; next to a merge of the same models its own view adds nothing.
        if record["reference"] == "base" or tuple(record["models"]) not in based:
            groups.setdefault(_shared(record), []).append((stage.name, record))
    return [_group(members) for members in groups.values()]


def input_diagnostics(record: Mapping[str, Any]) -> Group:
    """The strips of models that were measured but not merged."""
    return _group([("", record)])


def _shared(record: Mapping[str, Any]) -> str:
    layers = [[layer["layer"], layer["relative_norm"]] for layer in record["layers"]]
    return json.dumps([record["models"], record["reference"], layers])


def _group(members: Sequence[tuple[str, Mapping[str, Any]]]) -> Group:
    _, record = members[0]
    models = [str(model) for model in record["models"]]
    origin = "the base" if record["reference"] == "base" else "their mean"
    strips = [
        _strip(
            record,
            f"Distance of each model from {origin}, relative to the size of its weights",
            models,
            lambda layer: layer["relative_norm"],
            as_percent=True,
        )
    ]
    if len(models) > 1:
        strips += [
            _strip(
                record,
                "Conflict: share of changed entries pulled both ways, share of all change that cancels",
                ["pulled both ways", "cancels"],
                lambda layer: [layer["sign_conflict"], layer["weighted_sign_conflict"]],
                as_percent=True,
            ),
            _cosines(record, models),
        ]
    notes: list[str] = []
    for name, own in members:
        notes += [f"{name}: {warning}." for warning in own.get("warnings", ())]
        measured = [layer for layer in (*own["layers"], own["model"]) if layer.get("ranks")]
        if not measured:
            continue
        ranks = {rank for layer in measured for rank in layer["ranks"]}
        full = max(layer["full_rank"] for layer in measured)
        if len(ranks) == 1:
            notes.append(f"{name} keeps {ranks.pop():.0f} of {full:.0f} singular directions of every model.")
        else:
            title = f"{name}: singular directions kept of each model, of {full:.0f}; mean over matrices"
            strips.append(_strip(own, title, models, lambda layer: layer.get("ranks"), whole=True))
        if any(abs(weight - 1) > 1e-6 for layer in measured for weight in layer["weights"]):
            title = f"{name}: weight of each model, mean over matrices"
            strips.append(_strip(own, title, models, lambda layer: layer.get("weights")))
    merges = tuple(name for name, _ in members)
    return Group(title=", ".join(models), merges=merges, strips=tuple(strips), notes=tuple(notes))


def _cosines(record: Mapping[str, Any], models: Sequence[str]) -> Strip:
    if len(models) <= MOST_PAIRED:
        pairs = list(itertools.combinations(range(len(models)), 2))
        return _strip(
            record,
            "Cosine of the models' changes; 0 is no overlap",
            [f"{models[s]} · {models[t]}" for s, t in pairs],
            lambda layer: [layer["cosine"][s][t] for s, t in pairs],
        )
    return _strip(
        record,
        "Cosine of each model's change with the others', mean; 0 is no overlap",
        models,
        lambda layer: [_mean(row[:s] + row[s + 1 :]) for s, row in enumerate(layer["cosine"])],
    )


def _strip(
    record: Mapping[str, Any],
    title: str,
    rows: Sequence[str],
    pick: Callable[[Mapping[str, Any]], Sequence[float | None] | None],
    **style: Any,
) -> Strip:
    layers = [*record["layers"], record["model"]]
    names = ["rest" if layer["layer"] is None else str(layer["layer"]) for layer in record["layers"]]
    picked = [pick(layer) or [None] * len(rows) for layer in layers]
    return Strip(
        title=title,
        rows=rows,
        columns=(*names, "all"),
        num_summaries=1 + names.count("rest"),
        values=[[column[index] for column in picked] for index in range(len(rows))],
        **style,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
