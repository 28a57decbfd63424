"""Whole SVG files from the report's drawing primitives: no plotting library, the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Iterable

from weightsmith.reports.drawing import svg

STYLE = """
text { font: 11px sans-serif; fill: #333 } .title { font-weight: bold } .small { font-size: 10px }
.light { fill: #fff } .ink { fill: #222 }
.axis { stroke: #999; stroke-width: 1 } .grid { stroke: #ddd; stroke-width: 1 }
.a { fill: #4269d0 } .b { fill: #ff725c } .c { fill: #6cc5b0 } .d { fill: #efb118 }
.a-line { stroke: #4269d0; fill: none } .b-line { stroke: #ff725c; fill: none }
.c-line { stroke: #6cc5b0; fill: none } .d-line { stroke: #efb118; fill: none }
"""


def page(width: float, height: float, title: str, body: Iterable[str]) -> str:
    """A whole SVG file on a white ground; classes `a` to `d` fill, `a-line` to `d-line` draw lines."""
    inside = [f"<style>{STYLE}</style>", f'<rect width="{width}" height="{height}" fill="#fff"/>', *body]
    return (
        str(svg(width, height, title, inside)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        + "\n"
    )
