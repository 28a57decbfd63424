"""Options of merge methods: checked against the method's dataclass, which is the only place they are written.

An option arrives from a page or as a keyword; `check_options` turns it into the type of its field or says
what was wanted. Ranges belong to the method: its `__post_init__` calls `check_range`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from weightsmith.errors import InputError, nearest
from weightsmith.merging.parameter import PerModel


class OptionError(InputError):
    """One option of a method is wrong; `key` is its name on a page, `problem` what is wrong with it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key, self.problem = key, problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.key, self.problem)


def check_range(
    key: str,
    value: PerModel,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse a number, or any of several, outside [low, high]; either end may be left out.

    Raises:
        OptionError: says the legal interval.
    """
    for number in value if isinstance(value, tuple) else (value,):
        if not math.isfinite(number):
            raise OptionError(key, f"must be a finite number, got {number}")
        outside = number > high or number < low
        if outside or (open_low and number == low) or (open_high and number == high):
            left = "(" if open_low or low == -math.inf else "["
            right = ")" if open_high or high == math.inf else "]"
            raise OptionError(key, f"must be in {left}{low:g}, {high:g}{right}, got {number:g}")


@functools.cache
def schema(method: type) -> dict[str, Any]:
    """Options of a method by the name a page uses: the types of its dataclass's fields."""
    hints = typing.get_type_hints(method)
    return {page_key(field.name): hints[field.name] for field in dataclasses.fields(method)}


def page_key(field: str) -> str:
    """The name of a field on a page: `lambda_` is `lambda` (a reserved word of Python)."""
    return field.removesuffix("_")


def is_per_model(method: type, key: str) -> bool:
    """Whether option `key` takes one value for each model."""
    return schema(method).get(key) == PerModel or schema(method).get(key) == PerModel | None


def build(method: type, options: Mapping[str, Any], num_models: int) -> Any:
    """The method's instance for `num_models` models: options checked, `PerModel` fields as tuples.

    Raises:
        OptionError: an unknown key, a value of the wrong type or out of range, a wrong number of values.
    """
    known = schema(method)
    for key in options:
        if page_key(key) not in known:
            hint = nearest(key, known) or ";"
            raise OptionError(key, f"no such option{hint} known: {', '.join(known) or 'none'}")
    fields = {}
    given = {page_key(key): value for key, value in options.items()}
    for field in dataclasses.fields(method):
        key = page_key(field.name)
        value = given.get(key, field.default)
        if value is dataclasses.MISSING:
            value = field.default_factory()  # pyrefly: ignore
        value = check_type(key, value, known[key])
        if is_per_model(method, key) and value is not None:
            value = spread(key, value, num_models)
        fields[field.name] = value
    return method(**fields)


def spread(key: str, value: PerModel, num_models: int) -> tuple[float, ...]:
    """One number for each model.

    Raises:
        OptionError: a list whose length is not the number of models.
    """
    if not isinstance(value, tuple):
        return (value,) * num_models
    if len(value) != num_models:
        found = f"has {len(value)} values for {num_models} models"
        raise OptionError(key, f"{found}; give one number or one for each")
    return value


def check_type(key: str, value: Any, wanted: Any) -> Any:
    """`value` as the type of a field; integers pass for floats, lists for tuples, mappings for dataclasses.

    Raises:
        OptionError: it is something else; says what was wanted.
    """
    origin, choices = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        # 1 == True and False == 0: a choice is only met by its own type.
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        listed = ", ".join(map(str, choices))
        raise OptionError(
            key, f"must be one of {listed}, got {value!r}{nearest(str(value), map(str, choices))}"
        )
    if origin in (typing.Union, types.UnionType):
        for choice in choices:
            try:
                return check_type(key, value, choice)
            except OptionError:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(check_type(key, item, choices[0]) for item in value)
    elif wanted is type(None):
        if value is None:
            return None
    elif wanted is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # a whole number beyond all floats
                return float(value)
    elif dataclasses.is_dataclass(wanted):
        if isinstance(value, wanted):
            return value
        if isinstance(value, Mapping):
            return _nested(key, value, typing.cast(type, wanted))
    elif type(value) is wanted:
        return value
    raise OptionError(key, f"must be {_spoken(wanted)}, got {value!r}")


def _nested(key: str, value: Mapping[str, Any], wanted: type) -> Any:
    try:
        return build(wanted, value, 1)
    except OptionError as wrong:
        raise OptionError(f"{key}.{wrong.key}", wrong.problem) from None


def _spoken(wanted: Any) -> str:
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    if wanted in words:
        return words[wanted]
    if wanted == PerModel:
        return "a number or one for each model"
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_spoken(choice) for choice in typing.get_args(wanted))
    if typing.get_origin(wanted) is tuple:
        return f"a list, each {_spoken(typing.get_args(wanted)[0])}"
    if dataclasses.is_dataclass(wanted):
        return f"a mapping of {', '.join(schema(typing.cast(type, wanted)))}"
    return str(wanted)
