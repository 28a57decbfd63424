"""What a search for a tailored model found: the plans, the chosen one layer by layer, and the way there."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from weightsmith.reports import drawing
from weightsmith.reports.curves import HEIGHT, LEFT, RIGHT, WIDTH, Panel, axes, scales
from weightsmith.reports.folder import Run, Stage

CELL, TALL, HEAD, SIDE = 58.0, 30.0, 22.0, 74.0
WRAP = 16  # layers in a row of the drawing
# In the order in which plans of one budget are listed.
STATES = {"ok": "", "stopped": "given up", "nonfinite": "not finite", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Tailoring:
    """One search.

    Attributes:
        stage: Its name.
        words: What was chosen, in a sentence.
        drawing: The chosen plan, layer by layer.
        panels: Scores of the plans against each other, and the best so far of each rung.
        tasks: What was scored.
        rows: Plans that were scored on all examples, best mean first.
        others: All others that were tried: those of more examples first, then by state and mean.
    """

    stage: str
    words: str
    drawing: Markup
    panels: tuple[Panel, ...]
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    others: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan: its last trial.

    Attributes:
        trial: Number.
        words: The plan in one line.
        budget: Examples of each task that it was to be scored on.
        status: As the log has it.
        remark: What there is to say of it: chosen, unbeaten, given up, how it failed.
        scores: By task; those of what was scored where it was given up, none where it failed.
        mean: Of the scores; 0 where there are none.
        on_front: Whether no other beats it on every task.
        chosen: Whether it is the one.
    """

    trial: int
    words: str
    budget: int
    status: str
    remark: str
    scores: tuple[float, ...]
    mean: float
    on_front: bool
    chosen: bool


def tailorings(run: Run) -> list[Tailoring]:
    """One entry for each finished `tailor` stage."""
    return [_tailoring(stage, *found) for stage in run.stages if (found := stage.tailoring)]


def _tailoring(stage: Stage, plan: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Tailoring:
    names = [model["name"] for model in plan["models"]]
    tasks = tuple(plan["costs"])
    front = {point["trial"] for point in plan["front"]}
    last: dict[str, Mapping[str, Any]] = {}
    for trial in sorted(trials, key=lambda trial: trial["budget"]):
        last[json.dumps(trial["configuration"], sort_keys=True)] = trial
    found = [_row(trial, tasks, names, front, plan["settings"]["trial"]) for trial in last.values()]
    found.sort(key=_place)
    rows = tuple(row for row in found if row.budget == plan["budget"] and row.status == "ok")
    kept = plan["configuration"]["layers"]
    blended = sum(len(layer["sources"]) > 1 for layer in kept)
    failed = sum(trial["status"] not in ("ok", "stopped") for trial in trials)
    stopped = sum(trial["status"] == "stopped" for trial in trials)
    words = (
        f"{len(kept)} of {plan['configuration']['depth']} layers are kept, {blended} of them blended; chosen "
        f"among {len(front)} plans that no other beats on every task, after {len(trials)} trials of "
        f"{len(found)} plans"
        + (f", of which {failed} failed" if failed else "")
        + (f"; {stopped} were given up early." if stopped else ".")
    )
    return Tailoring(
        stage=stage.name,
        words=words,
        drawing=draw_plan(plan["configuration"], names),
        panels=(_scatter(stage, rows), _progress(stage, trials)),
        tasks=tasks,
        rows=rows,
        others=tuple(row for row in found if row not in rows),
    )


def _row(
    trial: Mapping[str, Any], tasks: Sequence[str], names: Sequence[str], front: set[int], chosen: int
) -> Row:
    number, status = trial["id"], trial["status"]
    scores = tuple(1 - trial["costs"][task] for task in tasks) if status in ("ok", "stopped") else ()
    remark = "chosen" if number == chosen else "unbeaten" if number in front else STATES[status]
    if error := (trial.get("error") or "").strip():
        remark += f": {drawing.shorten(error.splitlines()[-1], 80)}"
    return Row(
        trial=number,
        words=plan_words(trial["configuration"], names),
        budget=trial["budget"],
        status=status,
        remark=remark,
        scores=scores,
        mean=sum(scores) / max(1, len(scores)),
        on_front=number in front,
        chosen=number == chosen,
    )


def _place(row: Row) -> tuple[int, int, float, int]:
    """Most examples first, then what was scored whole, then the best."""
    return -row.budget, list(STATES).index(row.status), -row.mean, row.trial


def plan_words(configuration: Mapping[str, Any], names: Sequence[str]) -> str:
    """A whole plan in one line: what is dropped, and whose layers stand in the places that are left.

    Example:
        >>> layers = [{"layer": n, "sources": [1, 2] if n == 2 else [], "weight": 0.4} for n in (0, 1, 2)]
        >>> plan_words({"depth": 4, "layers": layers}, ["base", "code", "english"])
        'without 3; 0-1 base, 2 0.400 (code + english)'
    """
    kept = {layer["layer"]: _taken(layer, names) for layer in configuration["layers"]}
    dropped = [str(number) for number in range(configuration["depth"]) if number not in kept]
    parts = []
    # Neighbours that are taken alike differ from their places by the same number.
    by_run = itertools.groupby(enumerate(kept.items()), key=lambda item: (item[1][0] - item[0], item[1][1]))
    for (_, taken), run in by_run:
        numbers = [number for _, (number, _) in run]
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        parts.append(f"{span} {taken}")
    return f"without {', '.join(dropped) or 'none'}; {', '.join(parts)}"


def _taken(layer: Mapping[str, Any], names: Sequence[str]) -> str:
    source = _source(layer, names)
    return f"{layer['weight']:.3f} ({source})" if len(layer["sources"]) > 1 else source


def _source(layer: Mapping[str, Any], names: Sequence[str]) -> str:
    return " + ".join(names[source] for source in layer["sources"]) or names[0]


def draw_plan(configuration: Mapping[str, Any], names: Sequence[str]) -> Markup:
    """A box for each layer of the base: whose layer stands there, the weight of a blend, or nothing."""
    kept = {layer["layer"]: layer for layer in configuration["layers"]}
    depth = configuration["depth"]
    labels = [drawing.shorten(name, 12) for name in names]
    body = []
    height = 0.0
    for first in range(0, depth, WRAP):
        top = height
        for number in range(first, min(first + WRAP, depth)):
            x = SIDE + (number - first) * CELL
            body.append(drawing.text(x + CELL / 2, top + HEAD - 8, number, "tick", "middle"))
            layer = kept.get(number)
            for row, label in enumerate(labels):
                y = top + HEAD + row * TALL
                taken = layer is not None and row in (layer["sources"] or [0])
                tip = f"layer {number}: " + ("dropped" if layer is None else _source(layer, names))
                if layer is not None and len(layer["sources"]) > 1:
                    tip += f", weight {layer['weight']:.3f}"
                css = "cell" if taken else "none"
                style = "--v:70%" if taken else ""
                body.append(
                    drawing.box(x + 1, y + 1, CELL - 2, TALL - 2, css, title=tip, round=3, style=style)
                )
                if taken and layer is not None and len(layer["sources"]) > 1:
                    words = f"{layer['weight']:.2f}"
                    body.append(drawing.text(x + CELL / 2, y + TALL / 2 + 4, words, "over", "middle"))
                if first == number:
                    body.append(drawing.text(SIDE - 8, y + TALL / 2 + 4, label, "label", "end"))
            if layer is None:
                middle = top + HEAD + len(labels) * TALL / 2
                body.append(drawing.line(x + 8, middle, x + CELL - 8, middle, "gone"))
        height = top + HEAD + len(labels) * TALL + 8
    title = f"The chosen plan: {plan_words(configuration, names)}"
    return drawing.svg(SIDE + min(depth, WRAP) * CELL, height, title, body, css="strip plan")


def _scatter(stage: Stage, rows: Sequence[Row]) -> Panel:
    """Mean score against the score of the worst task; of two tasks, one against the other."""
    two = len(rows[0].scores) == 2
    points = [(row.scores[0], row.scores[1]) if two else (row.mean, min(row.scores)) for row in rows]
    x, y = scales([a for a, _ in points], [b for _, b in points])
    body = axes(x, y, "first task" if two else "mean score")
    order = sorted(zip(rows, points, strict=True), key=lambda item: (item[0].chosen, item[0].on_front))
    for row, (a, b) in order:
        css, radius = ("chosen", 5.5) if row.chosen else ("end", 3.4) if row.on_front else ("left-out", 2.2)
        tip = f"trial {row.trial}, {row.words}: {', '.join(f'{score:.3f}' for score in row.scores)}"
        body.append(drawing.dot(x(a), y(b), radius, css, tip))
    best = next(row for row in rows if row.chosen)
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 16), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, f"chosen {best.mean:.3f}", "value", "end"))
    title = f"Plans of {stage.name} at the highest budget; the chosen one has a mean score of {best.mean:.3f}"
    what = "Second task over the first" if two else "Score of the worst task over the mean score"
    note = f"{what}, calibration; bold are plans that no other beats on every task, large is the chosen one."
    return Panel(stage=stage.name, chart=drawing.svg(WIDTH, HEIGHT, title, body, css="plot"), note=note)


def _progress(stage: Stage, trials: Sequence[Mapping[str, Any]]) -> Panel:
    """Best mean score so far over trials, a line for each budget."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for trial in trials:
        score = 1 - sum(trial["costs"].values()) / len(trial["costs"])
        line = lines.setdefault(trial["budget"], [])
        line.append((float(trial["id"]), max(score, line[-1][1] if line else -math.inf)))
    values = [score for line in lines.values() for _, score in line]
    x, y = scales([0.0, float(len(trials))], values)
    body = axes(x, y, "trial")
    found = sorted(lines.items())
    for number, (_, line) in enumerate(found):
        steps = [(line[0][0], line[0][1])]
        for at, score in line[1:]:
            steps += [(at, steps[-1][1]), (at, score)]
        steps.append((float(len(trials)), steps[-1][1]))
        css = "smooth" if number == len(lines) - 1 else "raw"
        body.append(drawing.path([(x(at), y(score)) for at, score in steps], css))
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 16), "panel"))
    best = f"{found[-1][1][-1][1]:.3f}"
    body.append(drawing.text(WIDTH - RIGHT, 17, f"best {best}", "value", "end"))
    ends = ", ".join(f"{line[-1][1]:.3f} on {budget} examples of each task" for budget, line in found)
    title = f"Best mean score so far in {stage.name}: {ends}"
    note = f"Best mean score so far of each rung, in the end {ends}. The bold line is the last of them."
    return Panel(stage=stage.name, chart=drawing.svg(WIDTH, HEIGHT, title, body, css="plot"), note=note)
