"""A page of YAML -> validated stages, before anything starts.

    name: quickstart            folder of the run: runs/quickstart (default: the file's name)
    seed: 0                     every stage derives its own from it
    stages:
      base: {train: {model: testbed/xs, data: [source, docs]}}
      code: {finetune: {model: base, data: source}}

A stage is `name: {kind: {config}}` and names only stages above it, so there are no cycles. Every problem of
the page is reported at once, one line each: `file:line: stages.code.modle: no such key; did you mean
`model`?`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import PageError, nearest
from weightsmith.recipes.models import problem_with
from weightsmith.recipes.stages import KINDS, stage_class
from weightsmith.recipes.stages.contract import Entry, Keys
from weightsmith.recipes.validation import show, validate
from weightsmith.runs.pages import Source, parse

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TOP = ("name", "seed", "stages")


@dataclass(frozen=True)
class Page:
    """A validated recipe.

    Attributes:
        path: The file.
        text: Its content, as written.
        name: The recipe's name, also that of its run folder.
        seed: Seed of the whole recipe.
        stages: The stages by name, in the page's order, which is an order in which they can run.
    """

    path: Path
    text: str
    name: str
    seed: int
    stages: Mapping[str, Entry]


def load_page(path: str | Path) -> Page:
    """Read and validate a recipe.

    Raises:
        PageError: the page is wrong; one line per problem, each with file, line and key.
    """
    source = parse(path)
    return _Reader(source).page()


class _Reader:
    """Collects problems while it goes through the page, so that the user sees all of them at once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[tuple[int, str]] = []

    def page(self) -> Page:
        top = self.source.value
        if not isinstance(top, dict):
            raise PageError.at(self.source.path, 1, "", f"expected the keys {', '.join(_TOP)}, found {top!r}")
        for key in top:
            if key not in _TOP:
                self._say((key,), f"no such key{nearest(key, _TOP)}")
        name = self._name(top.get("name", Path(self.source.path).stem))
        seed = top.get("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            self._say(("seed",), f"expected a whole number from 0 on, found {seed!r}")
        stages = self._stages(top.get("stages"))
        if self.problems:
            lines = [text for _, text in sorted(self.problems, key=lambda problem: problem[0])]
            raise PageError("\n".join(lines))
        return Page(Path(self.source.path), self.source.text, name, seed, stages)

    def _name(self, name: Any) -> str:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self._say(("name",), f"a name is letters, digits, `_`, `-` and `.`, found {name!r}")
        return str(name)

    def _stages(self, body: Any) -> dict[str, Entry]:
        if not isinstance(body, dict) or not body:
            found = "nothing" if not body else repr(body)
            self._say(("stages",), f"expected at least one stage (name: {{kind: ...}}), found {found}")
            return {}
        entries: dict[str, Entry] = {}
        for name, stage in body.items():
            config = self._config(name, stage)
            if config is not None:
                line = self.source.line(("stages", name))
                stages = self._references(name, config, entries, list(body))
                config = config.completed({earlier: entries[earlier].config for earlier in entries})
                entries[name] = Entry(name, config, line, stages)
        return entries

    def _config(self, name: str, stage: Any) -> Any | None:
        """The config object of one stage, or None after its problems are noted."""
        if not _NAME.fullmatch(name):
            self._say(("stages", name), "a stage's name is letters, digits, `_`, `-` and `.`")
            return None
        if not isinstance(stage, dict) or len(stage) != 1:
            found = ", ".join(stage) if isinstance(stage, dict) and stage else repr(stage)
            self._say(
                ("stages", name),
                f"expected one stage kind with its options ({', '.join(KINDS)}), found {found}",
            )
            return None
        ((kind, body),) = stage.items()
        if kind not in KINDS:
            known = ", ".join(KINDS)
            self._say(("stages", name, kind), f"no stage kind `{kind}`{nearest(kind, KINDS)}; known: {known}")
            return None
        body = {} if body is None else body
        where: Keys = ("stages", name, kind)
        if not isinstance(body, dict):
            self._say(where, f"expected a mapping of options, found {body!r}")
            return None
        cls = stage_class(kind)
        config, problems = cls.parse(body) if hasattr(cls, "parse") else validate(cls, body)
        problems = [*problems, *(config.problems() if config is not None else ())]
        for problem in problems:
            self._say((*where, *problem.keys), problem.text)
        return None if problems else config

    def _references(
        self, name: str, config: Any, entries: Mapping[str, Entry], names: list[str]
    ) -> tuple[str, ...]:
        """Check the models of a stage; the names of the stages among them."""
        makers = [earlier for earlier, entry in entries.items() if entry.config.makes_model]
        stages = []
        position = names.index(name)
        for reference in config.references():
            keys: Keys = ("stages", name, config.kind, *reference.keys)
            value = reference.value
            if value in names[position:]:
                what = "itself" if value == name else f"`{value}`, which is defined below"
                line = self.source.line(("stages", value))
                self._say(keys, f"a stage uses only stages above it, not {what} (line {line})")
            elif value in names:
                stages.append(value)
                if value in entries and value not in makers:
                    self._say(keys, f"`{value}` makes no model: it is an `{entries[value].kind}` stage")
                elif reference.output == "states" and not _keeps_states(entries.get(value)):
                    self._say(keys, f"`{value}` keeps no states; give it `average: keep`")
            elif reference.output == "states":
                self._say(
                    keys, f"`{value}` is no stage above{nearest(value, makers)}; folders go into `models`"
                )
            elif problem := problem_with(value, makers, needs_weights=config.needs_weights):
                self._say(keys, problem)
        return tuple(dict.fromkeys(stages))

    def _say(self, keys: Keys, text: str) -> None:
        line = self.source.line(keys)
        # The kind is left out of the shown key: users think `stages.merged.density`.
        shown = show(keys[:2] + keys[3:]) if keys[:1] == ("stages",) and len(keys) > 3 else show(keys)
        self.problems.append((line, str(PageError.at(self.source.path, line, shown, text))))


def _keeps_states(entry: Entry | None) -> bool:
    """Whether a stage does; one that is wrong itself has said so already."""
    return entry is None or bool(getattr(entry.config, "keeps_states", False))
