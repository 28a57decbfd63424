"""What the parts of a training did while it went on: clipping, sharpness, states chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.reports import drawing
from weightsmith.reports.curves import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Panel, axes, scales, thinned
from weightsmith.reports.folder import Run, Stage
from weightsmith.reports.words import choice_name

Points = Sequence[tuple[float, float]]


def clipping_panels(run: Run) -> list[Panel]:
    """Norms of gradients of each training, and what AdaGC clipped; none where all clip globally."""
    stages = [stage for stage in run.stages if stage.kind in ("train", "finetune") and stage.metrics]
    ways = {choice_name(stage.config.get("clip") or "global") for stage in stages}
    if ways <= {"global"}:
        return []
    panels = []
    for stage in stages:
        norms = _series(stage, "grad_norm")
        if norms:
            panels.append(_panel(stage, "norm of gradients", norms, drawing.number(_mean(norms)) + " mean"))
        clipped = _series(stage, "clipped")
        if clipped:
            smallest = _series(stage, "smallest_factor")
            words = f"{100 * _mean(clipped):.0f} % clipped"
            panels.append(_panel(stage, "share clipped", clipped, words, thin=smallest, span=(0.0, 1.0)))
    return panels


def sharpness_panels(run: Run) -> list[Panel]:
    """How much higher the loss is at the perturbed point, of each stage with two-pass steps."""
    found = [(stage, _series(stage, "sharpness")) for stage in run.stages]
    return [
        _panel(stage, "sharpness", points, f"{points[0][1]:.3f} → {points[-1][1]:.3f}")
        for stage, points in found
        if points
    ]


def selection_panels(run: Run) -> list[Panel]:
    """Which states an average was made of, and with which weights."""
    found = [(stage, stage.selection) for stage in run.stages]
    return [_selection(stage, chosen) for stage, chosen in found if chosen and chosen["steps"]]


def _series(stage: Stage, key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in stage.metrics if line.get(key) is not None]


def _mean(points: Points) -> float:
    return sum(value for _, value in points) / len(points)


def _panel(
    stage: Stage,
    what: str,
    points: Points,
    words: str,
    *,
    thin: Points = (),
    span: tuple[float, float] | None = None,
) -> Panel:
    values = [value for _, value in (*points, *thin)]
    ordered = sorted(values)
    # A single spike doesn't set the scale.
    high = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    x, y = scales([step for step, _ in points], span or [min(0.0, *values), high])
    body = axes(x, y, "step")
    if thin:
        body.append(drawing.path(thinned(thin, x, y), "raw"))
    body.append(drawing.path(thinned(points, x, y), "smooth"))
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 16), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, words, "value", "end"))
    title = f"{what.capitalize()} of {stage.name} over steps: {words}"
    return Panel(stage=stage.name, chart=drawing.svg(WIDTH, HEIGHT, title, body, css="plot"), note=what)


def _selection(stage: Stage, chosen: Mapping[str, Any]) -> Panel:
    """A bar for each state, as high as its weight; below the axis nothing was taken."""
    steps, weights = chosen["steps"], chosen["weights"]
    top = max(weights)
    spread = max(steps) - min(steps) or 1
    x, y = scales([min(steps) - 0.03 * spread, max(steps) + 0.03 * spread], [0.0, top])
    y = drawing.Scale(0.0, 1.06 * top, HEIGHT - BOTTOM, y.stop)
    body = axes(x, y, "step")
    width = max(1.2, min(9.0, 0.7 * (WIDTH - LEFT - RIGHT) / len(steps)))
    for step, weight in zip(steps, weights, strict=True):
        if weight > 0:
            tip = f"step {step}: weight {weight:.3f}"
            height = y(0.0) - y(weight)
            body.append(drawing.box(x(step) - width / 2, y(weight), width, height, "bar", title=tip))
        else:
            body.append(drawing.dot(x(step), y(0.0), 1.6, "left-out", f"step {step}: left out"))
    number = sum(weight > 0 for weight in weights)
    words = f"{chosen['method']}: {number} of {len(steps)} states"
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 16), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, words, "value", "end"))
    taken = ", ".join(str(step) for step in chosen["chosen_steps"])
    title = f"States averaged in {stage.name}: {words}; steps {taken}"
    chart = drawing.svg(WIDTH, HEIGHT, title, body, css="plot")
    return Panel(stage=stage.name, chart=chart, note=_losses(chosen))


def _losses(chosen: Mapping[str, Any]) -> str:
    losses = [f"{name} {value:.4f}" for name, value in chosen["losses"].items() if value is not None]
    return f"Loss on held-out data: {', '.join(losses)}." if losses else ""
