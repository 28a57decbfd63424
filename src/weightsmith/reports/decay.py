"""Exponents and decays of AlphaDecay by matrix over time: one small map for each kind of matrix.

Rows are layers, columns are looks at the spectra, dark is large. Maps of one quantity share one scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from weightsmith.checkpoints.names import layer_index
from weightsmith.errors import InputError
from weightsmith.reports import drawing
from weightsmith.runs import read_lines, write_text

MAP_WIDTH, MAP_HEIGHT, GAP, LEFT, HEAD, FOOT = 118.0, 110.0, 16.0, 34.0, 40.0, 24.0
MOST_LOOKS = 40
MOST_TIPS = 1500  # cells up to which each tells its value
QUANTITIES = (
    ("alpha", "Exponent of the spectrum’s tail (alpha); a low one is a heavy tail"),
    ("weight_decay", "Weight decay"),
)


@dataclass(frozen=True)
class _Map:
    """One kind of matrix: rows are layers, columns looks; None where there is no value."""

    kind: str
    layers: Sequence[int]
    values: Sequence[Sequence[float | None]]


def draw_decay(records: Sequence[Mapping[str, Any]], name: str = "") -> list[tuple[str, Markup]]:
    """A caption and an SVG for each quantity; empty without records.

    Args:
        records: Lines of `alphadecay.jsonl`, or `AlphaDecay.history`.
        name: Of the stage, for readers of the drawing's title.
    """
    return [(caption, _draw(_looks(records), key, caption, name)) for key, caption in QUANTITIES if records]


def plot_decay(source: str | Path | Sequence[Mapping[str, Any]], file: str | Path | None = None) -> str:
    """Draw a run's exponents and decays as one SVG that stands alone.

    Args:
        source: A run's `alphadecay.jsonl`, or its records (`AlphaDecay.history`).
        file: Where to write the SVG as well.

    Returns:
        The SVG; the same records give the same bytes.

    Raises:
        InputError: there are no records.
    """
    records = read_lines(source) if isinstance(source, (str, Path)) else list(source)
    if not records:
        raise InputError(
            f"{source if isinstance(source, (str, Path)) else 'history'}: no look at the spectra to draw"
        )
    svg = drawing.stacked([chart for _, chart in draw_decay(records)])
    if file is not None:
        write_text(file, svg)
    return svg


def _looks(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All looks, or so many at even distances that a map stays legible, the last among them."""
    every = math.ceil(len(records) / MOST_LOOKS)
    return list(records)[::-1][::every][::-1]


def _maps(records: Sequence[Mapping[str, Any]], key: str) -> list[_Map]:
    rows: dict[str, dict[int, list[float | None]]] = {}
    for index, record in enumerate(records):
        for name, value in record[key].items():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            empty: list[float | None] = [None] * len(records)
            row = rows.setdefault(kind, {}).setdefault(layer_index(name) or 0, empty)
            row[index] = None if value is None else float(value)
    return [_Map(kind, sorted(layers), [layers[i] for i in sorted(layers)]) for kind, layers in rows.items()]


def _draw(records: Sequence[Mapping[str, Any]], key: str, caption: str, name: str) -> Markup:
    maps = _maps(records, key)
    known = [v for entry in maps for row in entry.values for v in row if v is not None and math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    shade = drawing.Scale(low, high, 0.04, 1.0)
    body = [drawing.text(LEFT, 12, f"from {low:.3g} to {high:.3g}", "tick")]
    tips = len(known) <= MOST_TIPS
    for number, entry in enumerate(maps):
        left = LEFT + number * (MAP_WIDTH + GAP)
        body.append(drawing.text(left, HEAD - 8, drawing.shorten(entry.kind, 18), "panel"))
        width, height = MAP_WIDTH / len(records), MAP_HEIGHT / len(entry.layers)
        for row, (layer, values) in enumerate(zip(entry.layers, entry.values, strict=True)):
            top = HEAD + row * height
            if number == 0 and (height >= 11 or row % math.ceil(11 / height) == 0):
                body.append(drawing.text(LEFT - 6, top + height / 2 + 4, layer, "tick", "end"))
            for column, value in enumerate(values):
                x = left + column * width
                if value is None or not math.isfinite(value):
                    body.append(drawing.box(x, top, width, height, "none"))
                    continue
                step = records[column]["step"]
                tip = f"{entry.kind}, layer {layer}, step {step}: {value:.3g}" if tips else ""
                style = f"--v:{100 * shade(value):.0f}%"
                body.append(drawing.box(x, top, width, height, "cell", title=tip, style=style))
        bottom = HEAD + MAP_HEIGHT + 14
        body.append(drawing.text(left, bottom, records[0]["step"], "tick"))
        if len(records) > 1:
            body.append(drawing.text(left + MAP_WIDTH, bottom, records[-1]["step"], "tick", "end"))
    of = f" of {name}" if name else ""
    title = f"{caption}: each matrix{of}, by layer, over steps; {low:.3g} to {high:.3g}"
    wide = LEFT + len(maps) * (MAP_WIDTH + GAP)
    return drawing.svg(wide, HEAD + MAP_HEIGHT + FOOT, title, body, css="strip map")
