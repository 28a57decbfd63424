"""A mapping of a page against a dataclass: every problem at its own key, in words a user knows.

pydantic does the checking (strictly: `"3"` is not a number, `yes` is not a switch); this file turns its
findings into `Problem`s. The class itself is closed to unknown keys; dataclasses inside it are where they
carry `__pydantic_config__ = {"extra": "forbid"}`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from weightsmith.errors import nearest
from weightsmith.recipes.stages.contract import Keys, Problem

T = TypeVar("T")

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "nothing",
}


def validate(cls: type[T], body: Mapping[str, Any]) -> tuple[T | None, list[Problem]]:
    """`cls` made from `body`, or None and every problem found.

    Args:
        cls: A keyword-only dataclass. Range checks of its `__post_init__` (any `ValueError`) count as
            problems of the
            field that the message starts with.
        body: Plain Python values: dicts, lists, strings, numbers, booleans, None.
    """
    declared = dataclasses.fields(cls)  # pyrefly: ignore[bad-argument-type]
    fields = [field.name for field in declared]
    # A misspelt key is none of those that are there; the signature also has what is no field (`InitVar`).
    free = [name for name in inspect.signature(cls).parameters if name not in body]
    needed = [field.name for field in declared if field.name in free and _is_required(field)]
    problems = [
        Problem((key,), f"no such key{nearest(key, needed) or nearest(key, free)}")
        for key in body
        if key not in fields
    ]
    known = {key: value for key, value in body.items() if key in fields}
    try:
        value = TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        more = _problems(cls, known, error.errors(include_url=False))
        meant = [problem.text for problem in problems]
        # One slip, one line: `modle` already says that `model` is what is missing.
        return None, problems + [
            problem
            for problem in more
            if problem.text != "is missing" or not any(f"`{problem.keys[-1]}`" in text for text in meant)
        ]
    return (None if problems else value), problems


def show(keys: Sequence[str | int]) -> str:
    """`models[1].weight` for `("models", 1, "weight")`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def _problems(cls: type, body: Any, errors: Sequence[Any]) -> list[Problem]:
    found: dict[Keys, list[tuple[Any, bool]]] = {}
    for error in errors:
        keys, in_union = _walk(body, error["loc"], error["type"])
        found.setdefault(keys, []).append((error, in_union))
    problems = []
    for keys, group in found.items():
        deeper = any(other[: len(keys)] == keys and len(other) > len(keys) for other in found)
        if deeper and all(in_union for _, in_union in group):
            continue  # one form of the value fitted better and has its own, more exact problem
        problems.append(_say(cls, body, keys, [error for error, _ in group]))
    return problems


def _walk(body: Any, loc: Sequence[str | int], kind: str) -> tuple[Keys, bool]:
    """The part of pydantic's `loc` that the page has, without the names of union members; whether there were
    any.
    """
    keys: list[str | int] = []
    node, in_union = body, False
    for position, key in enumerate(loc):
        last = position == len(loc) - 1
        if (isinstance(node, Mapping) and key in node) or (
            isinstance(node, list) and isinstance(key, int) and key < len(node)
        ):
            node = node[key]
        elif not (last and kind in ("missing", "unexpected_keyword_argument")):
            in_union = True
            continue
        keys.append(key)
    return tuple(keys), in_union


def _say(cls: type, body: Any, keys: Keys, errors: list[Any]) -> Problem:
    first = errors[0]
    kind, value = first["type"], first["input"]
    if kind == "unexpected_keyword_argument":
        return Problem(keys, f"no such key{nearest(str(keys[-1]), _fields_at(cls, keys[:-1]))}")
    if kind == "missing":
        return Problem(keys, "is missing")
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return Problem(
            keys, f"expected {first['ctx']['expected']}, found {value!r}{nearest(str(value), allowed)}"
        )
    if kind == "value_error":
        text = str(first["ctx"]["error"])
        mentioned = re.search(r"\w+", text)
        # Only the whole dataclass is known to have failed; its message starts with the field it is about.
        if mentioned and isinstance(body, Mapping) and not keys and mentioned[0] in body:
            return Problem((mentioned[0],), text.removeprefix(mentioned[0]).lstrip(" :") or text)
        return Problem(keys, text)
    if kind in _EXPECTED:
        wanted = list(
            dict.fromkeys(_EXPECTED[error["type"]] for error in errors if error["type"] in _EXPECTED)
        )
        return Problem(keys, f"expected {' or '.join(wanted)}, found {_short(value)}")
    return Problem(keys, f"{_lower(first['msg'].removeprefix('Input '))}, found {_short(value)}")


def _fields_at(cls: Any, keys: Keys) -> list[str]:
    """Names of the fields of the dataclass at `keys` below `cls`; of `cls` where that can't be told."""
    from typing import get_args, get_type_hints

    for key in keys:
        if not isinstance(key, str) or not dataclasses.is_dataclass(cls):
            break
        hint = get_type_hints(cls).get(key)
        inner = [entry for entry in (hint, *get_args(hint)) if dataclasses.is_dataclass(entry)]
        if inner:
            cls = inner[0]
    return [field.name for field in dataclasses.fields(cls)]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
