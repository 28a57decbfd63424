"""Stages that do the same training with other parts switched on: side by side, against the plain one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from weightsmith.reports import drawing
from weightsmith.reports.curves import axes, scales, smoothed
from weightsmith.reports.folder import Run, Stage
from weightsmith.reports.words import PART_KEYS, part_words

# What a variant may differ in, and what changes nothing that is learnt.
_NUMBERS = ("learning_rate", "betas", "weight_decay", "layer_drop", "warmup_steps", "schedule", "seed")
VARIED = (*PART_KEYS, "held_out", *_NUMBERS)
_NO_EFFECT = ("save_every", "keep_checkpoints", "log_every", "device", "threads")
WIDTH, HEIGHT = 520.0, 260.0
Curve = Sequence[tuple[float, float]]
COLOURS = 8  # classes `s0` ... `s7` of the page's style
# The steep beginning would press all curves together: the scale begins after this part of the run.
BEGINNING = 0.25


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the comparison.

    Attributes:
        stage: The stage.
        words: What differs from the first; empty for the first itself.
        colour: Number of its colour.
        loss: Smoothed training loss at the end.
        change: The same relative to the first, None for the first itself.
        slower: Its time relative to the first's.
    """

    stage: Stage
    words: str
    colour: int
    loss: float | None
    change: float | None
    slower: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants of one training, the plain one first, and their charts; `seeded` where all share one seed."""

    title: str
    seeded: bool
    rows: tuple[Variant, ...]
    charts: tuple[tuple[str, Markup], ...]


def groups(run: Run) -> list[list[Stage]]:
    """Finished training stages that differ in nothing but what `VARIED` names; the plainest first."""
    found: dict[str, list[Stage]] = {}
    for stage in run.stages:
        if stage.kind in ("train", "finetune") and stage.state == "done":
            same = {k: v for k, v in stage.config.items() if k not in (*VARIED, *_NO_EFFECT)}
            found.setdefault(json.dumps([stage.kind, same], sort_keys=True), []).append(stage)
    several = [members for members in found.values() if len(members) > 1]
    return [sorted(members, key=lambda stage: len(part_words(stage.config))) for members in several]


def comparisons(run: Run) -> list[Comparison]:
    """One for each training that the run does in several ways."""
    return [_comparison(members) for members in groups(run)]


def _comparison(members: Sequence[Stage]) -> Comparison:
    curves = [_curve(stage) for stage in members]
    first, rows = members[0], []
    for index, (stage, curve) in enumerate(zip(members, curves, strict=True)):
        loss = curve[-1][1] if curve else None
        against = curves[0][-1][1] if index and curves[0] else None
        rows.append(
            Variant(
                stage=stage,
                words=_difference(first.config, stage.config) if index else "",
                colour=index % COLOURS,
                loss=loss,
                change=(loss - against) / against if loss is not None and against else None,
                slower=stage.seconds / first.seconds if index and stage.seconds and first.seconds else None,
            )
        )
    charts = []
    if sum(len(curve) > 1 for curve in curves) > 1:
        charts.append(("Training loss, smoothed", _chart(members, curves, "Training loss of")))
    if len(curves[0]) > 1:
        apart = [_apart(curve, curves[0]) for curve in curves]
        words = f"Loss less {first.name}'s of"
        charts.append((f"The same less that of {first.name}", _chart(members, apart, words)))
    seeds = {stage.config.get("seed") for stage in members}
    return Comparison(
        title=first.name, seeded=len(seeds) == 1 and None not in seeds, rows=tuple(rows), charts=tuple(charts)
    )


def _difference(plain: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What a variant has that the plain one has not, in the page's words."""
    before, after = part_words(plain), part_words(other)
    found = [words for key, words in after.items() if before.get(key) != words]
    found += [f"no {words}" for key, words in before.items() if key not in after]
    for key in _NUMBERS:
        value = other.get(key)
        if value is not None and value != plain.get(key):
            found.append(f"{key} {drawing.number(value) if isinstance(value, float) else value}")
    return ", ".join(found) or "nothing"


def _curve(stage: Stage) -> list[tuple[float, float]]:
    logged = [(float(line["step"]), line.get("loss")) for line in stage.metrics]
    points = [(step, float(loss)) for step, loss in logged if loss is not None and math.isfinite(loss)]
    return list(zip((step for step, _ in points), smoothed([loss for _, loss in points]), strict=True))


def _apart(curve: Curve, plain: Curve) -> list[tuple[float, float]]:
    against = dict(plain)
    return [(step, loss - against[step]) for step, loss in curve if step in against]


def _chart(members: Sequence[Stage], curves: Sequence[Curve], what: str) -> Markup:
    steps = [step for curve in curves for step, _ in curve]
    late = min(steps) + BEGINNING * (max(steps) - min(steps))
    values = [value for curve in curves for step, value in curve if step >= late]
    x, y = scales(steps, values, width=WIDTH, height=HEIGHT)
    body = axes(x, y, "step", width=WIDTH, height=HEIGHT)
    for index, curve in enumerate(curves):
        points = [(x(step), y(value)) for step, value in curve if y.low <= value <= y.high]
        some = points[:: max(1, len(points) // 300)] + points[-1:]
        body.append(drawing.path(some, f"series s{index % COLOURS}"))
    names = ", ".join(stage.name for stage in members)
    return drawing.svg(WIDTH, HEIGHT, f"{what} {names} over steps", body, css="plot")
