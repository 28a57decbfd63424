"""Heat strips: one quantity over the layers, one row for each model, dark where it is large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from weightsmith.reports import drawing

ROW, GAP, HEAD, WIDE, NARROW = 24.0, 2.0, 22.0, 50.0, 17.0
MOST_WIDE = 14  # columns up to which values are printed


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One quantity over layers.

    Attributes:
        title: What it is.
        rows: Labels, usually models.
        columns: Labels, usually layers.
        values: (rows, columns); None where the quantity does not exist.
        as_percent: Print values in percent.
        whole: Values are counts.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    as_percent: bool = False
    whole: bool = False

    def show(self, value: float) -> str:
        """A value in print."""
        if self.as_percent:
            return f"{100 * value:.1f} %" if abs(value) < 0.0995 else f"{100 * value:.0f} %"
        if self.whole:
            return f"{value:.0f}" if value == round(value) else f"{value:.1f}"
        return drawing.number(float(f"{value:.3g}"))


def draw_strip(strip: Strip) -> Markup:
    """The strip as SVG: wide cells with values while the layers are few, else narrow with tooltips."""
    known = [value for row in strip.values for value in row if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    # Colour starts at zero, so that an even quantity looks even and not like a contrast that isn't there.
    shade = drawing.Scale(min(low, 0.0), high, 0.06, 1.0)
    wide = len(strip.columns) <= MOST_WIDE
    cell = WIDE if wide else NARROW
    names = [drawing.shorten(row, 20) for row in strip.rows]
    left = max((drawing.text_width(name, 12) for name in names), default=0) + 12
    every = 1 if wide else max(1, math.ceil(len(strip.columns) / 16))
    body = []
    for index, column in enumerate(strip.columns):
        if wide or index % every == 0:
            words = drawing.shorten(column, 8 if wide else 3)
            body.append(
                drawing.text(left + index * (cell + GAP) + cell / 2, HEAD - 8, words, "tick", "middle")
            )
    for number, (name, row) in enumerate(zip(names, strip.values, strict=True)):
        top = HEAD + number * (ROW + GAP)
        body.append(drawing.text(left - 8, top + 16, name, "label", "end"))
        for index, value in enumerate(row):
            x = left + index * (cell + GAP)
            if value is None or not math.isfinite(value):
                body.append(drawing.box(x, top, cell, ROW, "none", round=2))
                continue
            share = shade(value) if high > min(low, 0.0) else 0.06
            tip = f"{strip.rows[number]}, layer {strip.columns[index]}: {strip.show(value)}"
            body.append(
                drawing.box(x, top, cell, ROW, "cell", title=tip, round=2, style=f"--v:{100 * share:.0f}%")
            )
            if wide:
                css = "over" if share > 0.55 else "under"
                body.append(drawing.text(x + cell / 2, top + 16, strip.show(value), css, "middle"))
    width = left + len(strip.columns) * (cell + GAP)
    height = HEAD + len(strip.rows) * (ROW + GAP)
    title = f"{strip.title}, by layer; from {strip.show(low)} to {strip.show(high)}"
    return drawing.svg(width, height, title, body, css="strip")
