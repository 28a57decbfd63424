"""`write_evidence_page`: the results of an evidence -> one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from weightsmith import __version__
from weightsmith.errors import InputError
from weightsmith.registry import METHODS
from weightsmith.reports import drawing
from weightsmith.reports.comparison import draw_figure
from weightsmith.runs import write_text
from weightsmith.runs.atomic import read_json

VERDICTS = {
    "reproduced": "The claim shows at this scale.",
    "weaker claim": "A weaker form of the claim shows at this scale.",
    "not shown": "The claim does not show at this scale.",
}


def write_evidence_page(folder: str | Path, name: str) -> Path:
    """Write `<name>.html` from `<name>.json`, `.md` and, where the JSON has no figures, `.svg`.

    Args:
        folder: What an evidence wrote with `--out`.
        name: Of the evidence.

    Returns:
        The page's path; the same results give the same bytes.

    Raises:
        InputError: the results are missing or can't be read.
        SystemFault: the page can't be written.
    """
    folder = Path(folder)
    for suffix in (".json", ".md"):
        if not (folder / f"{name}{suffix}").is_file():
            raise InputError(f"{folder}: no results of `{name}` (expected {name}.json and {name}.md)")
    results = read_json(folder / f"{name}.json")
    words = (folder / f"{name}.md").read_text(encoding="utf-8")
    title, _, rest = words.partition("\n")
    environment = Environment(
        loader=PackageLoader("weightsmith.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    figures = results.get("figures", [])
    card = next((card for card in METHODS if card.id == name), None)
    page = environment.get_template("evidence.html.j2").render(
        name=name,
        title=title.lstrip("# "),
        purpose=card.purpose if card else "",
        paper=card.paper if card else "",
        verdict=VERDICTS.get(results.get("verdict", ""), ""),
        facts=list(_facts(results)),
        figures=[draw_figure(figure, figures) for figure in figures] or _picture(folder / f"{name}.svg"),
        words=Markup(_tables_scroll(MarkdownIt("commonmark").enable("table").render(rest))),
        environment=sorted(_flat(results.get("environment", {}))),
        css=Markup(environment.loader.get_source(environment, "page.css")[0]),
        version=__version__,
    )
    target = folder / f"{name}.html"
    write_text(target, page)
    return target


def _facts(results: Mapping[str, Any]) -> Iterator[str]:
    seeds = results.get("seeds", results.get("seed_list"))
    if isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds):
        yield f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    if "size" in results:
        yield f"test-bed {results['size']}"
    if isinstance(results.get("seconds"), int | float):
        yield f"{drawing.seconds(results['seconds'])} of work"


def _picture(file: Path) -> list[Markup]:
    """A drawing of the evidence's own as an image: its style stays inside."""
    if not file.is_file():
        return []
    data = base64.b64encode(file.read_bytes()).decode()
    return [Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(file.stem, data)]


def _tables_scroll(html: str) -> str:
    frame = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'
    return html.replace("<table>", f"{frame}<table>").replace("</table>", "</table></div>")


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        else:
            yield f"{before}{key}", str(value)
