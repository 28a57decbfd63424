"""The few drawing primitives the charts share, written as SVG text.

Written by hand rather than through matplotlib because an inline SVG made of classes takes its colours and its
dark mode from the page's CSS, scales with the reader's font, costs a few kilobytes and no import, and has the
same bytes on every machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup, escape

# Mean advance of a character in font sizes, for common sans-serif fonts: labels get room by it.
CHARACTER = 0.58


def svg(
    width: float, height: float, title: str, body: Iterable[str], *, css: str = "", detail: str = ""
) -> Markup:
    """An accessible SVG: `title` is its name, `detail` its longer description for those who can't see it."""
    detail = f"<desc>{escape(detail)}</desc>" if detail else ""
    area = f'viewBox="0 0 {at(width)} {at(height)}" width="{at(width)}" height="{at(height)}"'
    name = escape(title)
    head = f'<svg class="{css}" {area} role="img" aria-label="{name}"><title>{name}</title>'
    return Markup(f"{head}{detail}{''.join(body)}</svg>")


def stacked(charts: Sequence[Markup]) -> str:
    """Charts one below the other as one SVG that stands alone, with the page's style inside."""
    style = resources.files("weightsmith.reports").joinpath("page.css").read_text(encoding="utf-8")
    parts, top, widest = [], 0.0, 0.0
    for chart in charts:
        match = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', chart)
        assert match
        parts.append(str(chart).replace("<svg ", f'<svg y="{at(top)}" ', 1))
        top, widest = top + float(match[2]) + 12, max(widest, float(match[1]))
    area = f'viewBox="0 0 {at(widest)} {at(top)}" width="{at(widest)}" height="{at(top)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {area}><style>{escape(style)}</style>'
    return f'{head}<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}</svg>\n'


def text(x: float, y: float, words: object, css: str = "", anchor: str = "start") -> str:
    """A line of text whose baseline starts, centres or ends at (x, y)."""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{at(x)}" y="{at(y)}"{_css(css)}{place}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str = "") -> str:
    """A straight line."""
    return f'<line x1="{at(x1)}" y1="{at(y1)}" x2="{at(x2)}" y2="{at(y2)}"{_css(css)}/>'


def path(points: Sequence[tuple[float, float]], css: str = "") -> str:
    """A polyline through `points`."""
    steps = "L".join(f"{at(x)} {at(y)}" for x, y in points)
    return f'<path d="M{steps}"{_css(css)}/>' if points else ""


def dot(x: float, y: float, radius: float, css: str = "", title: str = "") -> str:
    """A circle with a tooltip."""
    return f'<circle cx="{at(x)}" cy="{at(y)}" r="{at(radius)}"{_css(css)}>{_title(title)}</circle>'


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    css: str = "",
    *,
    title: str = "",
    round: float = 0,
    style: str = "",
) -> str:
    """A rectangle with a tooltip."""
    corner = f' rx="{at(round)}"' if round else ""
    style = f' style="{escape(style)}"' if style else ""
    return (
        f'<rect x="{at(x)}" y="{at(y)}" width="{at(width)}" height="{at(height)}"{corner}{_css(css)}{style}>'
        f"{_title(title)}</rect>"
    )


def at(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough, and keeps files small and equal everywhere."""
    return f"{value:.1f}".removesuffix(".0")


def text_width(words: str, size: float) -> float:
    """Room to leave for `words` at font size `size`."""
    return CHARACTER * size * len(words)


def shorten(words: str, limit: int) -> str:
    """`words` cut to `limit` characters with an ellipsis in the middle, where names differ least."""
    if len(words) <= limit:
        return words
    head = (limit - 1 + 1) // 2
    return f"{words[:head]}…{words[len(words) - (limit - 1 - head) :]}"


@dataclass(frozen=True)
class Scale:
    """Values low..high onto pixels start..stop; logarithmic where asked, which needs low > 0."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round values inside low..high, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last - first + 1 <= most:
            # Rounding to the step's own digits keeps 0.1 * 3 from printing as 0.30000000000000004.
            digits = max(0, -math.floor(math.log10(step * factor)))
            return [round(k * step * factor, digits) for k in range(first, last + 1)]
    return [low, high]


def number(value: float) -> str:
    """A number for an axis or a label: short, real minus sign, no exponent where plain digits do."""
    if value == 0:
        return "0"
    size = abs(value)
    plain = f"{size:,.0f}".replace(",", " ") if size >= 1000 else f"{size:.4g}"
    if size < 1e-3 or size >= 1e7:
        plain = f"{size:.2g}"
    return f"−{plain}" if value < 0 else plain


def seconds(value: float | None) -> str:
    """A duration: `3.2 s`, `4 min 31 s`, `2 h 5 min`."""
    if value is None:
        return "–"
    if value < 59.95:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(count: float | None) -> str:
    """Bytes in decimal units, as disks and networks are sold."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if count >= 9.95 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _css(css: str) -> str:
    return f' class="{css}"' if css else ""


def _title(title: str) -> str:
    return f"<title>{escape(title)}</title>" if title else ""
