"""What the pages of this room share: templates, style, and how a table of scores is coloured."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from weightsmith.reports import drawing
from weightsmith.reports.scores import ROLE_TITLES, Cell, Row, ScoreTable


def page_environment() -> Environment:
    """The templates of this room, with the filters they use."""
    environment = Environment(
        loader=PackageLoader("weightsmith.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": drawing.seconds, "size": drawing.size, "yaml": highlight}
    return environment


def page_style(environment: Environment) -> Markup:
    """The style that every page carries inside."""
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, "page.css")[0])


def highlight(source: str) -> Markup:
    """YAML with its keys and comments marked, nothing more: the eye only needs the page's outline."""
    return Markup("\n").join(_highlight_line(line) for line in source.rstrip("\n").split("\n"))


def _highlight_line(line: str) -> Markup:
    body, comment = line, ""
    if match := re.search(r"(^|\s)#.*$", line):
        # A `#` inside quotes is no comment; an odd number of quotes before it means that one is open.
        head = line[: match.start()]
        if head.count('"') % 2 == 0 and head.count("'") % 2 == 0:
            body, comment = head, line[match.start() :]
    # After escaping: an entity such as `&lt;` ends in `;`, so it never passes for a key.
    keyed = re.sub(r"([\w.\-]+)(?=:(\s|$))", r"<b>\1</b>", str(escape(body)))
    return Markup(keyed) + (Markup("<i>{}</i>").format(comment) if comment else "")


def by_role(table: ScoreTable) -> list[tuple[str, list[Row]]]:
    """The rows of a table, each group with its title."""
    titled = [(titles, table.of_role(role)) for role, titles in ROLE_TITLES.items()]
    return [(titles[len(rows) > 1], rows) for titles, rows in titled if rows]


def tint(cell: Cell, table: ScoreTable) -> str:
    """The cell's colour as CSS: which way it moved and how strongly, from nothing to the table's span."""
    if cell.change is None or cell.change == 0:
        return ""
    strength = min(1.0, abs(cell.change) / table.span)
    return f"--hue:var(--{'better' if cell.change > 0 else 'worse'});--v:{68 * strength:.0f}%"
