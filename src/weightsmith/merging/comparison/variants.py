"""The page of a comparison as each method takes it.

    base: models/base
    models: [models/code, {model: models/english, weight: 0.7}]
    density: 0.3                      every method that has the option takes it
    by_method:
      ties: {density: 0.2, lambda: 0.8}   for one method alone; wins over the page's

A page of mergekit serves as well: its `parameters` hold for every method that knows them. `method` (or
`merge_method`) may stay on the page and counts for nothing here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError, PageError, nearest
from weightsmith.merging.config import (
    OWN_KEYS,
    Input,
    Keys,
    MergeConfig,
    fail,
    listed,
    parse_merge,
)
from weightsmith.merging.options import is_per_model, page_key, schema
from weightsmith.registry import cards, load
from weightsmith.runs.pages import Source as Page
from weightsmith.runs.pages import parse as parse_page

BY_METHOD = "by_method"
_OF_MODEL = ("model", "statistics")

PageLike = Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class Variant:
    """The page as one method takes it.

    Attributes:
        method: The method's id.
        body: The page's keys and values, those it knows; plain JSON.
        config: The same, checked.
    """

    method: str
    body: Mapping[str, Any]
    config: MergeConfig


@dataclass(frozen=True)
class Variants:
    """A page, taken by every method that was asked for.

    Attributes:
        page: Its text, as JSON where it was no file.
        name: What to call it.
        reference: The plain mean of the page's models with its base beside it: what results are measured in.
        found: Methods that can take it, those that work on tiles first (they need no torch).
        refused: Method -> why it can't.
    """

    page: str
    name: str
    reference: MergeConfig
    found: tuple[Variant, ...]
    refused: Mapping[str, str]


def read_variants(page: PageLike, methods: Sequence[str] = ("all",)) -> Variants:
    """Read the page of a comparison.

    Args:
        page: A file, or its content.
        methods: `all`, or names of methods; a method that is named and can't take the page is an error.

    Raises:
        PageError: what is wrong, with file and line.
        InputError: no such method, or one is named twice.
    """
    body, source = _read(page)
    if "merge_method" not in body:
        _check_keys(body, source)
    names = _names(methods)
    by_name = tuple(methods) != ("all",)
    found, refused = [], {}
    problem: PageError | None = None
    for name in names:
        taken = _body_for(body, name)
        own = (body.get(BY_METHOD) or {}).get(name) or {}
        try:
            config = parse_merge(taken, _OwnPage.of(source, name, own) if source else None)
            if getattr(load(name, "merging"), "per_task", False) and config.options.get("task") is None:
                config.fail(
                    (), "makes a model for the task of each input: name the `task`, or merge by it alone"
                )
        except PageError as wrong:
            if by_name or own:
                raise
            problem = problem or wrong
            refused[name] = reason(wrong)
            continue
        found.append(Variant(name, taken, config))
    if not found:
        raise problem or InputError(f"{_called(page)}: no method can take this page")
    found.sort(key=lambda variant: is_spectral(variant.method))
    reference = _reference(found[0].config, source)
    text = source.text if source else json.dumps(_plain(body), indent=2)
    return Variants(text, _called(page), reference, tuple(found), refused)


def with_method(page: PageLike, method: str) -> MergeConfig:
    """The page, merged by another method than it names; options that this one has not are told in a warning.

    Raises:
        PageError: what is wrong, with file and line.
        InputError: no such method.
    """
    body, source = _read(page)
    if "merge_method" not in body:
        _check_keys(body, source)
    (name,) = _names([method])
    own = (body.get(BY_METHOD) or {}).get(name) or {}
    taken = _body_for(body, name)
    config = parse_merge(taken, _OwnPage.of(source, name, own) if source else None)
    left = [key for key in body if key not in (*taken, "method", "merge_method", BY_METHOD)]
    notes = tuple(f"option `{key}` has no effect on `{name}` and is ignored" for key in left)
    return dataclasses.replace(config, warnings=(*config.warnings, *notes))


def is_spectral(method: str) -> bool:
    """Whether a method works on whole matrices, with torch."""
    return bool(getattr(load(method, "merging"), "spectral", False))


def reason(problem: Exception) -> str:
    """What is wrong, without the place on the page."""
    return re.sub(r"^\S+?:\d+: ", "", str(problem)) if isinstance(problem, PageError) else str(problem)


@dataclass(frozen=True)
class _OwnPage(Page):
    """A page on which some options of one method stand under `by_method`."""

    prefix: Keys = ()
    own: frozenset[str] = frozenset()

    @classmethod
    def of(cls, page: Page, method: str, own: Mapping[str, Any]) -> _OwnPage:
        return cls(page.path, page.text, page.value, page.node, (BY_METHOD, method), frozenset(own))

    def line(self, keys: Sequence[str | int]) -> int:
        """1-based line of a key of the method's own, else of the page's."""
        return super().line((*self.prefix, *keys) if keys and keys[0] in self.own else keys)


def _read(page: PageLike) -> tuple[Mapping[str, Any], Page | None]:
    if isinstance(page, Mapping):
        return page, None
    source = parse_page(page)
    if not isinstance(source.value, dict):
        fail(source, (), "expected keys and values, `models:` among them")
    return source.value, source


def _called(page: PageLike) -> str:
    return "the page" if isinstance(page, Mapping) else Path(page).name


def _names(methods: Sequence[str]) -> list[str]:
    known = [card.id for card in cards("merging")]
    if tuple(methods) == ("all",):
        return known
    for place, name in enumerate(methods):
        if name not in known:
            hint = nearest(name, ["all", *known]) or ";"
            raise InputError(f"no merge method `{name}`{hint} known: all, {', '.join(known)}")
        if name in methods[:place]:
            raise InputError(f"method `{name}` is named twice")
    return list(methods)


def _check_keys(body: Mapping[str, Any], page: Page | None) -> None:
    """Refuse keys that no method knows, and what `by_method` can't hold."""
    options = {key for card in cards("merging") for key in schema(load(card.id, "merging"))}
    for key in body:
        if key not in OWN_KEYS and key != BY_METHOD and page_key(key) not in options:
            hint = nearest(key, [*OWN_KEYS, BY_METHOD, *options]) or ""
            fail(page, (key,), f"no merge method has such an option{hint}")
    for place, entry in enumerate(listed(body, "models", page)):
        for key in entry if isinstance(entry, Mapping) else ():
            if key not in _OF_MODEL and page_key(key) not in options:
                hint = nearest(key, [*_OF_MODEL, *options]) or ""
                fail(page, ("models", place, key), f"no merge method has such an option{hint}")
    own = body.get(BY_METHOD) or {}
    if not isinstance(own, Mapping):
        fail(page, (BY_METHOD,), f"expected a mapping of methods, found {own!r}")
    known = [card.id for card in cards("merging")]
    for name, entry in own.items():
        if name not in known:
            hint = nearest(name, known) or ";"
            fail(page, (BY_METHOD, name), f"no merge method `{name}`{hint} known: {', '.join(known)}")
        if not isinstance(entry, Mapping):
            fail(page, (BY_METHOD, name), f"expected a mapping of options, found {entry!r}")
        fits = schema(load(name, "merging"))
        for key in entry:
            if page_key(key) not in fits:
                hint = nearest(key, fits) or ";"
                fail(
                    page,
                    (BY_METHOD, name, key),
                    f"`{name}` has no such option{hint} it has {', '.join(fits) or 'none'}",
                )


def _body_for(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What one method takes of the page."""
    if "merge_method" in body:
        return {**_plain(body), "merge_method": name}
    method = load(name, "merging")
    options = schema(method)
    made: dict[str, Any] = {"method": name}
    for key, value in {**body, **((body.get(BY_METHOD) or {}).get(name) or {})}.items():
        if key != "method" and (key in OWN_KEYS or page_key(key) in options):
            made[key] = _plain(value)
    of_model = {"model", *(("statistics",) if getattr(method, "statistics", None) else ())}
    of_model |= {key for key in options if is_per_model(method, key)}
    made["models"] = [
        {key: value for key, value in entry.items() if page_key(key) in of_model}
        if isinstance(entry, Mapping)
        else entry
        for entry in made["models"]
    ]
    return made


def _plain(value: Any) -> Any:
    """Values that JSON has."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _reference(config: MergeConfig, page: Page | None) -> MergeConfig:
    """The models of a merge as `linear` takes them, without the base among them."""
    if len(config.slices) > 1 or config.stacked or config.slices[0].module:
        key = "modules" if config.slices[0].module else "slices"
        fail(page, (key,), "only merges of whole models are compared; expected `models`")
    (part,) = config.slices
    base = config.base and Path(config.base).expanduser().resolve()
    inputs = [source for source in part.inputs if Path(source.model).expanduser().resolve() != base]
    if not inputs:
        fail(page, part.keys, "names no model beside the base")
    plain = tuple(Input(source.model, keys=source.keys) for source in inputs)
    slices = (dataclasses.replace(part, inputs=plain, options={}),)
    return dataclasses.replace(config, method="linear", slices=slices, options={}, warnings=())
