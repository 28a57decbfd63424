"""Small multiples of curves: the loss of every training stage, the strength search of every merge.

One panel a stage, each with its own scale: stages train on different data, so their losses don't compare, and
a panel stays legible whether there are three or thirty of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from weightsmith.reports import drawing
from weightsmith.reports.folder import Stage

WIDTH, HEIGHT = 340.0, 200.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 30.0, 36.0
MAX_POINTS = 240  # of a raw curve, about one every pixel


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart and the sentence under it."""

    stage: str
    chart: Markup
    note: str = ""


def loss_panel(stage: Stage) -> Panel | None:
    """Raw and smoothed training loss over steps; None when the stage logged none."""
    logged = [(line["step"], line["loss"]) for line in stage.metrics if line.get("loss") is not None]
    points = [(float(step), float(loss)) for step, loss in logged if math.isfinite(loss)]
    if not points:
        return None
    smooth = smoothed([loss for _, loss in points])
    first, last = smooth[0], smooth[-1]
    # Single spikes don't set the scale: the raw line may leave the frame, the smoothed one can't.
    raw = sorted(loss for _, loss in points)
    low = min(raw[int(0.005 * len(raw))], *smooth)
    high = max(raw[min(len(raw) - 1, int(0.995 * len(raw)))], *smooth)
    x, y = scales([step for step, _ in points], [low, high])
    body = axes(x, y, "step")
    body.append(drawing.path(thinned(points, x, y), "raw"))
    middle = [(x(step), y(loss)) for (step, _), loss in zip(points, smooth, strict=True)]
    body.append(drawing.path(middle[:: max(1, len(middle) // MAX_POINTS)] + middle[-1:], "smooth"))
    body.append(drawing.dot(*middle[-1], 3.2, "end"))
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 20), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, f"{first:.3f} → {last:.3f}", "value", "end"))
    title = f"Training loss of {stage.name}: {first:.3f} at the start, {last:.3f} at step {points[-1][0]:.0f}"
    missing = len(logged) - len(points)
    note = f"{missing} steps had a loss that is not a finite number." if missing else ""
    return Panel(stage=stage.name, chart=drawing.svg(WIDTH, HEIGHT, title, body, css="plot"), note=note)


def search_panel(stage: Stage) -> Panel | None:
    """Score on calibration over the searched option, the chosen value marked; None without a search."""
    trials = search_trials(stage)
    if not trials:
        return None
    varied = [key for key in trials[0][0] if len({repr(options.get(key)) for options, _ in trials}) > 1]
    chosen = chosen_options(stage)
    if len(varied) == 1 and all(_is_number(options.get(varied[0])) for options, _ in trials):
        chart = _search_curve(stage, varied[0], trials, chosen)
    else:
        chart = _search_list(stage, varied, trials, chosen)
    return Panel(stage=stage.name, chart=chart, note=_search_note(stage.search[0]))


def search_trials(stage: Stage) -> list[tuple[Mapping[str, Any], float]]:
    """(options, score on calibration) of each trial that has a finite score."""
    trials = stage.search or []
    return [
        (trial["options"], float(trial["score"]))
        for trial in trials
        if trial.get("score") is not None and math.isfinite(trial["score"])
    ]


def _search_note(trial: Mapping[str, Any]) -> str:
    better = "higher" if trial.get("higher_is_better") else "lower"
    return (
        f"{str(trial['metric']).replace('_', ' ').capitalize()}, {better} is better."
        if trial.get("metric")
        else ""
    )


def _trial_dot(x: float, y: float, chosen: bool, tip: str) -> str:
    return drawing.dot(x, y, 5.5, "chosen", tip) if chosen else drawing.dot(x, y, 3.2, "end", tip)


def chosen_options(stage: Stage) -> Mapping[str, Any] | None:
    """The searched options with the values that the finished stage has; None when nothing was searched."""
    for options, _ in search_trials(stage):
        if all(stage.config.get(key) == value for key, value in options.items()):
            return options
    return None


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a tenth of the curve, centred so that a steep start isn't drawn late.

    The window shrinks towards the start and is cut off at the end: the last value is the mean of the last
    steps.
    """
    sums = [0.0, *itertools.accumulate(values)]
    half = len(values) // 20
    means = []
    for index in range(len(values)):
        reach = min(half, index)
        start, stop = index - reach, min(len(values), index + reach + 1)
        means.append((sums[stop] - sums[start]) / (stop - start))
    return means


def _search_curve(
    stage: Stage,
    option: str,
    trials: Sequence[tuple[Mapping[str, Any], float]],
    chosen: Mapping[str, Any] | None,
) -> Markup:
    points = sorted((float(options[option]), score) for options, score in trials)
    values, scores = [value for value, _ in points], [score for _, score in points]
    log = min(values) > 0 and max(values) / min(values) > 20
    x, y = scales(values, scores, log=log)
    body = axes(x, y, option, at=values if len(values) <= 6 else None)
    body.append(drawing.path([(x(value), y(score)) for value, score in points], "smooth"))
    for value, score in points:
        here = chosen is not None and float(chosen[option]) == value
        body.append(_trial_dot(x(value), y(score), here, f"{option} {drawing.number(value)}: {score:.4f}"))
    words = f"{option} = {drawing.number(float(chosen[option]))}" if chosen else ""
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 20), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, words, "value", "end"))
    title = (
        f"Strength search of {stage.name}: score on calibration over {option}, chosen {words or 'unknown'}"
    )
    return drawing.svg(WIDTH, HEIGHT, title, body, css="plot")


def _search_list(
    stage: Stage,
    varied: Sequence[str],
    trials: Sequence[tuple[Mapping[str, Any], float]],
    chosen: Mapping[str, Any] | None,
) -> Markup:
    """Several options varied at once: a dot per trial on one scale, in the order tried."""
    scores = [score for _, score in trials]
    x, y = scales([1, len(trials)], scores)
    body = axes(x, y, "trial")
    words = ""
    for index, (options, score) in enumerate(trials, start=1):
        tip = ", ".join(f"{key} {_option_words(options.get(key))}" for key in varied)
        here = options is chosen
        words = tip if here else words
        body.append(_trial_dot(x(index), y(score), here, f"{tip}: {score:.4f}"))
    body.append(drawing.text(LEFT, 17, drawing.shorten(stage.name, 20), "panel"))
    body.append(drawing.text(WIDTH - RIGHT, 17, drawing.shorten(words, 30), "value", "end"))
    title = f"Strength search of {stage.name}: score on calibration of {len(trials)} trials"
    detail = f"Chosen: {words or 'unknown'}"
    return drawing.svg(WIDTH, HEIGHT, title, body, css="plot", detail=detail)


def scales(
    xs: Sequence[float],
    ys: Sequence[float],
    log: bool = False,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> tuple[drawing.Scale, drawing.Scale]:
    """Scales of a chart of that size that hold all values."""
    low, high = min(ys), max(ys)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    x = drawing.Scale(min(xs), max(xs), LEFT + 6, width - RIGHT - 6, log)
    return x, drawing.Scale(low - pad, high + pad, height - BOTTOM, TOP)


def axes(
    x: drawing.Scale,
    y: drawing.Scale,
    x_words: str,
    at: Sequence[float] | None = None,
    *,
    width: float = WIDTH,
    height: float = HEIGHT,
) -> list[str]:
    """Grid and ticks; `at` are the ticks of the x axis."""
    body, bottom, right = [], height - BOTTOM, width - RIGHT
    for value in drawing.ticks(y.low, y.high, 5):
        body.append(drawing.line(LEFT, y(value), right, y(value), "grid"))
        body.append(drawing.text(LEFT - 6, y(value) + 3.5, drawing.number(value), "tick", "end"))
    for value in at or drawing.ticks(x.low, x.high, 5):
        body.append(drawing.line(x(value), bottom, x(value), bottom + 4, "axis"))
        body.append(drawing.text(x(value), bottom + 15, drawing.number(value), "tick", "middle"))
    body.append(drawing.line(LEFT, bottom, right, bottom, "axis"))
    body.append(drawing.text(right, height - 4, x_words, "tick", "end"))
    return body


def thinned(
    points: Sequence[tuple[float, float]], x: drawing.Scale, y: drawing.Scale
) -> list[tuple[float, float]]:
    """Pixels of a curve; of a long one the lowest and highest value of each stretch, so that spikes stay."""
    if len(points) > MAX_POINTS:
        step = 2 * len(points) / MAX_POINTS
        parts = [points[int(i * step) : int((i + 1) * step)] for i in range(MAX_POINTS // 2)]
        points = [point for part in parts if part for point in sorted((min(part, key=_y), max(part, key=_y)))]
    return [(x(step), min(max(y(loss), TOP), HEIGHT - BOTTOM)) for step, loss in points]


def _y(point: tuple[float, float]) -> float:
    return point[1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _option_words(value: object) -> str:
    return drawing.number(float(value)) if isinstance(value, int | float) else str(value)
