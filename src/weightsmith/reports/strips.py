"""Heat strips: one quantity over the layers, one row for each model, dark where it is large."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from weightsmith.reports import drawing

ROW, GAP, APART, HEAD, WIDE, NARROW = 24.0, 2.0, 10.0, 22.0, 52.0, 17.0
MOST_WIDE = 14  # layers up to which every value is printed


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One quantity over layers.

    Attributes:
        title: What it is.
        rows: Labels, usually models.
        columns: Labels: layers, then summaries.
        num_summaries: Columns at the end that are no layers; they stand apart and always print their values.
        values: (rows, columns); None where the quantity does not exist.
        as_percent: Print values in percent.
        whole: Values are counts, or means of counts.
        over: What a column is.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    num_summaries: int = 0
    as_percent: bool = False
    whole: bool = False
    over: str = "layer"

    @cached_property
    def _has_fractions(self) -> bool:
        return any(value is not None and value != round(value) for row in self.values for value in row)

    def show(self, value: float) -> str:
        """A value in print."""
        if self.as_percent:
            return f"{100 * value:.1f} %" if abs(value) < 0.0995 else f"{100 * value:.0f} %"
        if self.whole:
            return f"{value:.1f}" if self._has_fractions else f"{value:.0f}"
        return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def draw_strip(strip: Strip) -> Markup:
    """The strip as SVG: wide cells with values while the layers are few, else narrow with tooltips."""
    known = [value for row in strip.values for value in row if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    # Colour starts at zero, so that an even quantity looks even and not like a contrast that isn't there.
    shade = drawing.Scale(min(low, 0.0), high, 0.06, 1.0)
    names = [drawing.shorten(row, 24) for row in strip.rows]
    left = max((drawing.text_width(name, 12) for name in names), default=0) + 12
    layers = len(strip.columns) - strip.num_summaries
    is_wide = [index >= layers or layers <= MOST_WIDE for index in range(len(strip.columns))]
    widths = [WIDE if wide else NARROW for wide in is_wide]
    starts = list(itertools.accumulate((width + GAP for width in widths), initial=left))
    starts = [start + APART * (index >= layers) for index, start in enumerate(starts)]
    every = max(1, math.ceil(layers / 16))
    body = []
    for column, (start, width) in enumerate(zip(starts, widths, strict=False)):
        if is_wide[column] or column % every == 0:
            words = drawing.shorten(strip.columns[column], 8)
            body.append(drawing.text(start + width / 2, HEAD - 8, words, "tick", "middle"))
    for number, (name, row) in enumerate(zip(names, strip.values, strict=True)):
        top = HEAD + number * (ROW + GAP)
        body.append(drawing.text(left - 8, top + 16, name, "label", "end"))
        for column, value in enumerate(row):
            start, width = starts[column], widths[column]
            if value is None or not math.isfinite(value):
                body.append(drawing.box(start, top, width, ROW, "none", round=2))
                continue
            share = shade(value) if high > 0 else 0.06
            tip = f"{strip.rows[number]}, {strip.over} {strip.columns[column]}: {strip.show(value)}"
            style = f"--v:{100 * share:.0f}%"
            body.append(drawing.box(start, top, width, ROW, "cell", title=tip, round=2, style=style))
            if is_wide[column]:
                css = "over" if share > 0.55 else "under"
                body.append(drawing.text(start + width / 2, top + 16, strip.show(value), css, "middle"))
    height = HEAD + len(strip.rows) * (ROW + GAP)
    title = f"{strip.title}, by {strip.over}; from {strip.show(low)} to {strip.show(high)}"
    return drawing.svg(starts[-1], height, title, body, css="strip")
