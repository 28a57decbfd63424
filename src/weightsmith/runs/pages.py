"""A page of YAML as plain Python values that still know their lines.

YAML 1.2: `on` is text, `1e-3` is a number, a key given twice is an error. Values come out as plain dicts,
lists and scalars; `Source.line` gives the line of any key.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import PageError

_MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class Source:
    """A parsed page.

    Attributes:
        path: The file, for messages.
        text: Its content.
        value: The content as plain values.
    """

    path: Path
    text: str
    value: Any
    node: Any

    def line(self, keys: Sequence[str | int]) -> int:
        """1-based line of the deepest of `keys` that the page has."""
        node: Any = self.node
        line = 1
        for key in keys:
            try:
                place = node.lc.item if isinstance(key, int) else node.lc.key
                line = place(key)[0] + 1
                node = node[key]
            except (KeyError, IndexError, AttributeError, TypeError):
                break
        return line


def parse(path: str | Path) -> Source:
    """Read the page at `path`.

    Raises:
        PageError: no such file, not UTF-8, not YAML, a key given twice, a tag (`!!python/...`), or nothing in
            it; one line with file and line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise PageError.at(path, None, "", (fault.strerror or str(fault)).lower()) from fault
    except UnicodeDecodeError as problem:
        line = path.read_bytes()[: problem.start].count(b"\n") + 1
        raise PageError.at(path, line, "", "not UTF-8 text") from problem
    try:
        node = YAML(typ="rt").load(text)
        if node is None:
            raise PageError.at(path, None, "", "the page is empty")
        source = Source(path, text, None, node)
        return Source(path, text, _plain(source, node, (), itertools.count()), node)
    except RecursionError as problem:
        raise PageError.at(path, None, "", "nested too deeply") from problem
    except DuplicateKeyError as problem:
        name = str(problem.problem).partition('"')[2].partition('"')[0]
        raise PageError.at(path, _mark(problem), name, "is given twice") from problem
    except MarkedYAMLError as problem:
        what = ": ".join(part for part in (problem.context, problem.problem) if part)
        raise PageError.at(path, _mark(problem), "", f"not valid YAML: {what}") from problem
    except YAMLError as problem:
        raise PageError.at(path, None, "", f"not valid YAML: {' '.join(str(problem).split())}") from problem


def _plain(source: Source, node: Any, keys: tuple[str | int, ...], counted: Iterator[int]) -> Any:
    from ruamel.yaml.scalarbool import ScalarBoolean

    if next(counted) == _MOST_VALUES:  # a few lines of aliases can stand for more than any memory holds
        raise PageError.at(
            source.path, source.line(keys), ".".join(map(str, keys)), f"more than {_MOST_VALUES:,} values"
        )
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str):
                line = source.line((*keys, key))
                raise PageError.at(source.path, line, str(key), "keys must be text; put it in quotes")
        return {str(key): _plain(source, value, (*keys, str(key)), counted) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(source, value, (*keys, index), counted) for index, value in enumerate(node)]
    # ruamel's scalars are subclasses that remember their spelling (0x10, 1_000, 1e-3); the value is what
    # counts.
    if node is None or isinstance(node, bool | ScalarBoolean):
        return None if node is None else bool(node)
    for plain in (int, float, str):
        if isinstance(node, plain):
            return plain(node)
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag or not hasattr(node, "isoformat"):
        what = f"the tag {tag}" if tag else f"a {type(node).__name__}"
        raise PageError.at(source.path, source.line(keys), ".".join(map(str, keys)), f"{what} is not allowed")
    return node.isoformat()  # an unquoted date is meant as text here


def _mark(problem: Any) -> int | None:
    mark = problem.problem_mark or problem.context_mark
    return mark.line + 1 if mark else None
