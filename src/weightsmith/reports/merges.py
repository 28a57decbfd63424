"""The page of a comparison of merge methods, drawn from its `comparison.json` and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from weightsmith import __version__
from weightsmith.errors import InputError
from weightsmith.merging.comparison.run import COMPARISON_FILE, FORMAT
from weightsmith.reports import drawing
from weightsmith.reports.diagnostics import input_diagnostics
from weightsmith.reports.findings import headline
from weightsmith.reports.scores import Row, comparison_table
from weightsmith.reports.strips import Strip, draw_strip
from weightsmith.reports.template import by_role, page_environment, page_style, tint

Result = Mapping[str, Any]


def render_comparison(content: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        content: What `comparison.json` holds.

    Raises:
        InputError: it was written by another version.
    """
    if content.get("format") != FORMAT:
        raise InputError(
            f"{COMPARISON_FILE}: format {content.get('format')!r}, this version of weightsmith reads {FORMAT}"
        )
    environment = page_environment()
    table = comparison_table(content)
    results: Sequence[Result] = content["methods"]
    words = {entry["method"]: _options(entry) for entry in results}

    def method_words(row: Row) -> str:
        return words.get(row.name.removesuffix(" (merge)"), "") if row.role == "merge" else ""

    return environment.get_template("merges.html.j2").render(
        content=content,
        css=page_style(environment),
        version=__version__,
        facts=list(_facts(content)),
        lead=headline(table) if table else [_lead(content)],
        table=table,
        groups=by_role(table) if table else [],
        tint=tint,
        method_words=method_words,
        results=results,
        options=words,
        strips=[draw_strip(strip) for strip in _strips(content)],
        strip_titles=[strip.title for strip in _strips(content)],
        inputs=input_diagnostics(content["inputs"]) if content["inputs"] else None,
        draw_strip=draw_strip,
        longest=max((entry["seconds"] for entry in results), default=0) or 1,
        largest=max((entry["memory_bytes"] for entry in results), default=0) or 1,
        total=sum(entry["seconds"] for entry in results),
        is_yaml=not content["page"].startswith("{"),
    )


def _lead(content: Mapping[str, Any]) -> Markup:
    done, refused = len(content["methods"]), len(content["refused"])
    whole = done + len(content["waiting"]) + len(content["failed"])
    words = Markup("{} of {} methods that can merge these models did; {} can’t.").format(done, whole, refused)
    pairs = list(_pairs(content))
    if len(pairs) > 1:
        far, near = min(pairs), max(pairs)
        words += Markup(
            " The results most alike are <b>{}</b> and <b>{}</b> (cosine {:.3f}), the least <b>{}</b> and "
            "<b>{}</b> ({:.3f})."
        ).format(near[1], near[2], near[0], far[1], far[2], far[0])
    return words


def _pairs(content: Mapping[str, Any]) -> Iterator[tuple[float, str, str]]:
    names = [entry["method"] for entry in content["methods"]]
    for i, row in enumerate(content["cosine"]):
        for j in range(i):
            if row[j] is not None:
                yield row[j], names[j], names[i]


def _facts(content: Mapping[str, Any]) -> Iterator[str]:
    results = content["methods"]
    yield f"{len(content['models'])} models" + (
        f", base {content['base']}" if content["base"] else ", no base"
    )
    yield f"{content['elements']:,} weights"
    yield f"{len(results)} methods in {drawing.seconds(sum(entry['seconds'] for entry in results))}"
    if results:
        yield f"peak memory {drawing.size(max(entry['memory_bytes'] for entry in results))}"
    kept = sum(entry["kept"] for entry in results)
    yield "no checkpoint kept" if not kept else f"{kept} checkpoint{'s' * (kept != 1)} kept"


def _options(entry: Result) -> str:
    """A method's options in small print, as its page gives them."""
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in entry["options"].items()
        if key not in ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template", "nan_policy")
    )


def _strips(content: Mapping[str, Any]) -> list[Strip]:
    results: Sequence[Result] = content["methods"]
    if not results:
        return []
    models, rows = list(content["models"]), [entry["method"] for entry in results]
    origin = content["base"] or "mean of the models"

    def of(
        title: str, columns: Sequence[str], pick: Callable[[Mapping[str, Any]], Any], **style: Any
    ) -> Strip:
        values = [pick(entry["measures"]) for entry in results]
        return Strip(title=title, rows=rows, columns=columns, values=values, **style)

    found = [
        of(
            "Distance to the base and to each model, relative to the size of the base’s weights",
            (origin, *models),
            lambda one: [one["relative_norm"], *one["distances"]],
            as_percent=True,
            over="distance to",
        ),
        of(
            "Cosine of the result’s change with each model’s: whose way it goes",
            models,
            lambda one: one["cosine"],
            over="model",
        ),
        of(
            "Sign conflict: share of the entries changed by result and model that go opposite ways",
            models,
            lambda one: one["against"],
            as_percent=True,
            over="model",
        ),
        _layers(results, rows),
    ]
    if len(rows) > 1:
        sampled = content["sampled"] < content["elements"]
        where = f", in a sample of {content['sampled']:,} weights" if sampled else ""
        found.append(
            Strip(
                title=f"Cosine of the results’ changes with one another{where}",
                rows=[f"{place} {name}" for place, name in enumerate(rows, start=1)],
                columns=[str(place) for place in range(1, len(rows) + 1)],
                values=content["cosine"],
                over="result",
            )
        )
    return found


def _layers(results: Sequence[Result], rows: Sequence[str]) -> Strip:
    layers = results[0]["measures"]["layers"]
    names = ["rest" if layer["layer"] is None else str(layer["layer"]) for layer in layers]
    return Strip(
        title="Change by layer, relative to the size of the layer’s weights",
        rows=rows,
        columns=names,
        num_summaries=names.count("rest"),
        values=[[layer["relative_norm"] for layer in entry["measures"]["layers"]] for entry in results],
        as_percent=True,
    )


__all__ = ["COMPARISON_FILE", "render_comparison"]
