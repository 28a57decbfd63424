"""Figures of many models side by side, from plain data: dots on one scale, and a trade-off of two scores.

A figure is a mapping as it lies in an evidence's JSON:

    {"kind": "dots", "title", "axes": [word, ...], "order": word,
     "rows": [{"name", "group", "values": [[seed, ...], ...]}]}
        a panel for each axis, all of them with the same models in the same order, the best on the axis
        `order` first; a dot at the mean over seeds, a line from the least to the most; an empty list draws
        nothing
    {"kind": "scatter", "title", "x": word, "y": word, "points": [{"name", "group", "x", "y"}]}

Values are shares; axes are in points of a hundred. A group has one colour in all figures of a page.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from weightsmith.errors import InputError
from weightsmith.reports import drawing

ROW, HEAD, FOOT, GAP, PANEL, LABEL = 17.0, 58.0, 26.0, 22.0, 150.0, 11.0
SCATTER_WIDTH, SCATTER_HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760.0, 420.0, 52.0, 40.0, 48.0, 20.0
FURTHEST = 1.5  # lengths of the middle half that a value may lie off it before it leaves the scale

Figure = Mapping[str, Any]


def draw_figures(figures: Sequence[Figure]) -> str:
    """All figures one below the other as one SVG that stands alone; the same figures give the same bytes.

    Raises:
        InputError: a figure of an unknown kind, or without a model.
    """
    return drawing.stacked([draw_figure(figure, figures) for figure in figures])


def draw_figure(figure: Figure, beside: Sequence[Figure] = ()) -> Markup:
    """One figure.

    Args:
        figure: See the module.
        beside: Figures of the same page, which share the colours of groups.

    Raises:
        InputError: as `draw_figures`.
    """
    kinds = {"dots": _dots, "scatter": _scatter}
    kind = figure.get("kind")
    if kind not in kinds:
        raise InputError(f"figure: no kind `{kind}`; known: {', '.join(kinds)}")
    if not _entries(figure):
        raise InputError(f"figure `{figure.get('title', '')}`: no model to draw")
    groups = dict.fromkeys(entry["group"] for each in [*beside, figure] for entry in _entries(each))
    return kinds[kind](figure, {group: f"s{index % 8}" for index, group in enumerate(groups)})


def _entries(figure: Figure) -> Sequence[Mapping[str, Any]]:
    return figure.get("rows") or figure.get("points") or ()


def _dots(figure: Figure, css: Mapping[str, str]) -> Markup:
    axes = figure["axes"]
    key = list(axes).index(figure["order"])
    drawn = [row for row in figure["rows"] if row["values"][key]]
    ordered = sorted(drawn, key=lambda row: -statistics.fmean(row["values"][key]))
    left = max(drawing.text_width(row["name"], 12) for row in ordered) + 12
    width = left + len(axes) * (PANEL + GAP)
    bottom = HEAD + ROW * len(ordered)
    body = [drawing.text(0, 15, figure["title"], "panel"), *_legend(ordered, css, 32)]
    for index, row in enumerate(ordered):
        y = HEAD + ROW * (index + 0.5)
        body.append(drawing.text(left - 10, y + 4, row["name"], "", "end"))
        body.append(drawing.line(left, y, width - GAP, y, "grid"))
    for number, axis in enumerate(axes):
        start = left + number * (PANEL + GAP)
        values = [100 * value for row in ordered for value in row["values"][number]]
        scale = drawing.Scale(*_limits(values), start + 6, start + PANEL - 6)
        body.append(drawing.text(start + PANEL / 2, HEAD - 6, axis, "value", "middle"))
        for tick in drawing.ticks(scale.low, scale.high, 4):
            body.append(drawing.line(scale(tick), HEAD, scale(tick), bottom, "grid"))
            body.append(drawing.text(scale(tick), bottom + 14, drawing.number(tick), "tick", "middle"))
        for index, row in enumerate(ordered):
            seeds = [100 * value for value in row["values"][number]]
            if seeds:
                y = HEAD + ROW * (index + 0.5)
                body.append(_mark(scale, seeds, y, css[row["group"]], f"{row['name']}, {axis}"))
    tips = "; ".join(f"{row['name']} {100 * statistics.fmean(row['values'][key]):.1f}" for row in ordered)
    title = f"{figure['title']}: {', '.join(axes)}"
    return drawing.svg(width, bottom + FOOT, title, body, css="plot compare", detail=f"{axes[key]}: {tips}")


def _mark(scale: drawing.Scale, seeds: Sequence[float], y: float, css: str, name: str) -> str:
    """A dot with its range; an arrow at the edge for what lies off the scale."""
    mean, low, high = statistics.fmean(seeds), min(seeds), max(seeds)
    tip = f"{name}: {mean:.1f} ({low:.1f} to {high:.1f})"
    edge = "◂" if mean < scale.low else "▸" if mean > scale.high else ""
    if edge:
        at = scale(scale.low if mean < scale.low else scale.high)
        return f'<g class="{css}">{drawing.text(at, y + 4, edge, "off", "middle")}<title>{tip}</title></g>'
    inside = [min(max(value, scale.low), scale.high) for value in (low, high)]
    reach = drawing.line(scale(inside[0]), y, scale(inside[1]), y, f"series {css}")
    return reach + drawing.dot(scale(mean), y, 4, f"mark {css}", tip)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: all values, but for those so far off that the others would be squeezed."""
    ordered = sorted(values)
    if not ordered:
        return 0.0, 1.0
    first, third = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    room = FURTHEST * (third - first)
    near = [value for value in ordered if first - room <= value <= third + room]
    pad = 0.04 * (near[-1] - near[0]) or 1.0
    return near[0] - pad, near[-1] + pad


def _legend(entries: Sequence[Mapping[str, Any]], css: Mapping[str, str], y: float) -> list[str]:
    body, x = [], 6.0
    for group in dict.fromkeys(entry["group"] for entry in sorted(entries, key=lambda e: css[e["group"]])):
        body.append(drawing.dot(x, y - 4, 4, f"mark {css[group]}"))
        body.append(drawing.text(x + 8, y, group, "tick"))
        x += drawing.text_width(group, 11) + 30
    return body


def _scatter(figure: Figure, css: Mapping[str, str]) -> Markup:
    points = figure["points"]
    xs, ys = [100 * point["x"] for point in points], [100 * point["y"] for point in points]
    x = drawing.Scale(min(xs) - 3, max(xs) + 3, LEFT, SCATTER_WIDTH - RIGHT)
    y = drawing.Scale(min(ys) - 3, max(ys) + 3, SCATTER_HEIGHT - BOTTOM, TOP)
    body = [drawing.text(0, 15, figure["title"], "panel"), *_legend(points, css, 32)]
    for tick in drawing.ticks(y.low, y.high, 6):
        body.append(drawing.line(LEFT, y(tick), SCATTER_WIDTH - RIGHT, y(tick), "grid"))
        body.append(drawing.text(LEFT - 6, y(tick) + 4, drawing.number(tick), "tick", "end"))
    for tick in drawing.ticks(x.low, x.high, 8):
        body.append(drawing.line(x(tick), TOP, x(tick), SCATTER_HEIGHT - BOTTOM, "grid"))
        body.append(
            drawing.text(x(tick), SCATTER_HEIGHT - BOTTOM + 15, drawing.number(tick), "tick", "middle")
        )
    body.append(drawing.text(SCATTER_WIDTH - RIGHT, SCATTER_HEIGHT - 8, f"{figure['x']} →", "value", "end"))
    body.append(drawing.text(LEFT + 6, TOP + 4, f"↑ {figure['y']}", "value"))
    taken: list[tuple[float, float, float, float]] = [(LEFT, TOP - 8, LEFT + 260, TOP + 6)]
    for point in points:
        at = x(100 * point["x"]), y(100 * point["y"])
        taken.append((at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5))
    # The best ones get their names first; a name that finds no free place is left to the tooltip.
    for point in sorted(points, key=lambda point: -(point["x"] + point["y"])):
        at = x(100 * point["x"]), y(100 * point["y"])
        tip = f"{point['name']}: {figure['x']} {100 * point['x']:.1f}, {figure['y']} {100 * point['y']:.1f}"
        body.append(drawing.dot(*at, 4.5, f"mark {css[point['group']]}", tip))
        label = _free_place(at, drawing.text_width(point["name"], LABEL), taken)
        if label is not None:
            taken.append(label)
            body.append(drawing.text(label[0], label[3] - 3, point["name"], "tick"))
    title = f"{figure['title']}: {figure['x']} against {figure['y']}"
    return drawing.svg(SCATTER_WIDTH, SCATTER_HEIGHT, title, body, css="plot compare")


def _free_place(
    at: tuple[float, float], width: float, taken: Sequence[tuple[float, float, float, float]]
) -> tuple[float, float, float, float] | None:
    """Where a label fits beside its dot without touching anything: (left, top, right, bottom)."""
    for dx, dy in ((8, 0), (-8 - width, 0), (-width / 2, -12), (-width / 2, 12)):
        left, top = at[0] + dx, at[1] + dy - 7
        box = left, top, left + width, top + 14
        inside = box[0] >= LEFT and box[2] <= SCATTER_WIDTH and box[3] <= SCATTER_HEIGHT - BOTTOM
        apart = all(
            box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
            for other in taken
        )
        if inside and apart:
            return box
    return None
