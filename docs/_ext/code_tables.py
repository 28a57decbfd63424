"""Directives that turn code into tables, so that no page repeats what the code says.

```{methods} merging                       every method of a room, from the registry
```{options} weightsmith.x.y:Class         the fields of a dataclass: key, default, meaning
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from weightsmith import registry


class Methods(SphinxDirective):
    """The registry as a table; a method with a page links to it."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the table as Markdown, so that links are checked like any other."""
        lines = ["| Method | For | Evidence | Paper |", "|---|---|---|---|"]
        for card in registry.cards(self.arguments[0] if self.arguments else None):
            page = f"methods/{card.id}"
            name = f"{{doc}}`{card.name} </{page}>`" if page in self.env.found_docs else card.name
            paper = f"arXiv:{card.paper}" if card.paper else ""
            lines.append(f"| {name}<br>`{card.id}` | {card.purpose} | {card.verdict} | {paper} |")
        return _markdown(self, lines)


class Options(SphinxDirective):
    """The fields of a dataclass as a table."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Inherited fields first, as the dataclass orders them."""
        module, _, name = self.arguments[0].partition(":")
        cls = getattr(importlib.import_module(module), name)
        meaning = dict(_meanings(cls))
        lines = ["| Key | Default | Meaning |", "|---|---|---|"]
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, parameter in inspect.signature(cls).parameters.items():  # also what is no field (`InitVar`)
            words = " ".join(meaning.get(name, "").split()).replace("|", "\\|")
            if not words:
                raise self.error(f"{self.arguments[0]}: field `{name}` has no description")
            default = _default(fields.get(name, parameter))
            lines.append(f"| `{name.removesuffix('_')}` | {default} | {words} |")
        return _markdown(self, lines)


def _markdown(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    node = nodes.container()
    directive.state.nested_parse(lines, directive.content_offset, node)
    return node.children


def _default(field: Any) -> str:
    value = field.default
    factory = getattr(field, "default_factory", dataclasses.MISSING)
    if factory is not dataclasses.MISSING:
        value = factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "–"
    if dataclasses.is_dataclass(value):
        return "see below"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`" if value else "`[]`"
    words = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    return f"`{words}`"


def _meanings(cls: type) -> Iterator[tuple[str, str]]:
    """Field -> sentence, from the string under a field or the `Attributes:` of a docstring, bases first."""
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        yield from _attributes(inspect.getdoc(base) or "")
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                yield field.target.id, str(below.value.value)


def _attributes(docstring: str) -> list[tuple[str, str]]:
    section = re.search(r"^Attributes:\n((?:[ \n].*\n?)*)", docstring, re.MULTILINE)
    entry = r"^    (\w+): ((?:.*\n?)(?:^ {8}.*\n?)*)"
    return re.findall(entry, section[1] if section else "", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_directive("methods", Methods)
    app.add_directive("options", Options)
    return {"version": "1", "parallel_read_safe": True}
