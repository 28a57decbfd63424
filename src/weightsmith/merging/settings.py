"""Values that differ from tensor to tensor: what a page may write where it may write a number.

    0.5                                             the same everywhere
    [0, 0.5, 1]                                     over the depth, linearly between (mergekit's pages)
    {gradient: [0, 0.5, 1]}                         the same on our own pages, where a list is one value a
    model [{filter: self_attn, value: 0.3}, {value: 1}]   by the tensor's name; the first filter it contains
    decides

Depth runs from 0 at the first layer of a slice to 1 at its last (1 for a slice of one layer) and is 0 outside
the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import InputError, nearest

Scalar = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values at even steps over the depth."""

    values: tuple[Scalar, ...]

    def at(self, depth: float) -> Scalar:
        """Numbers are interpolated; of switches and words the step's own is taken."""
        place = depth * (len(self.values) - 1)
        step = int(place)
        below = self.values[step]
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in self.values):
            return below
        above = self.values[min(step + 1, len(self.values) - 1)]
        fraction = place - step
        return (1.0 - fraction) * below + fraction * above  # pyrefly: ignore


@dataclass(frozen=True, slots=True)
class PerTensor:
    """Rules in order: the text a tensor's name must contain (None: any) and the value it then has."""

    rules: tuple[tuple[str | None, Scalar | Gradient], ...]


@dataclass(frozen=True, slots=True)
class EachModel:
    """One value for each model, in the order of the models."""

    values: tuple[Scalar, ...]


Setting = Scalar | Gradient | PerTensor | EachModel | Mapping[str, Any] | tuple[Any, ...]


class SettingError(InputError):
    """A value is not in one of the forms; `keys` lead to the wrong part."""

    def __init__(self, keys: tuple[str | int, ...], problem: str) -> None:
        super().__init__(problem)
        self.keys, self.problem = keys, problem


def resolve(setting: Setting, tensor: str, depth: float, model: int) -> tuple[bool, Any]:
    """Whether the setting says anything of this tensor, and what.

    Args:
        setting: A parsed value.
        tensor: Name of the tensor.
        depth: 0 .. 1, see the text of this module.
        model: Position of the model, for `EachModel`.
    """
    if isinstance(setting, PerTensor):
        for word, value in setting.rules:
            if word is None or word in tensor:
                return True, value.at(depth) if isinstance(value, Gradient) else value
        return False, None
    if isinstance(setting, Gradient):
        return True, setting.at(depth)
    if isinstance(setting, EachModel):
        return True, setting.values[model]
    return True, setting


def leaves(setting: Setting) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every plain value inside, with the keys that lead to it on the page."""
    if isinstance(setting, PerTensor):
        for index, (_, value) in enumerate(setting.rules):
            for keys, leaf in leaves(value):
                yield (index, "value", *keys), leaf
    elif isinstance(setting, Gradient | EachModel):
        yield from (((index,), value) for index, value in enumerate(setting.values))
    else:
        yield (), setting


def parse(value: Any, *, lists_are_gradients: bool) -> Setting:
    """A setting out of plain values of a page.

    Args:
        value: Scalar, list or mapping.
        lists_are_gradients: A list of scalars runs over the depth (mergekit); else it holds one value a
        model.

    Raises:
        SettingError: none of the forms.
    """
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        rules = tuple(_rule(item, index, lists_are_gradients) for index, item in enumerate(value))
        return PerTensor(rules)
    if isinstance(value, dict) and "value" in value and not set(value) - {"filter", "value"}:
        return PerTensor((_rule(value, None, lists_are_gradients),))
    if isinstance(value, dict) and set(value) == {"gradient"}:
        return _gradient(value["gradient"], ("gradient",))
    if isinstance(value, list):
        return _gradient(value, ()) if lists_are_gradients else EachModel(_scalars(value, ()))
    return value


def _rule(
    rule: dict[str, Any], index: int | None, lists_are_gradients: bool
) -> tuple[str | None, Scalar | Gradient]:
    at = () if index is None else (index,)
    for key in rule:
        if key not in ("filter", "value"):
            known = ("filter", "value")
            raise SettingError((*at, key), f"no such key{nearest(key, known) or ';'} known: filter, value")
    if "value" not in rule:
        raise SettingError(at, "a rule needs a `value`")
    word = rule.get("filter")
    if word is not None and not isinstance(word, str):
        raise SettingError((*at, "filter"), f"must be a part of tensor names, got {word!r}")
    value = rule["value"]
    if isinstance(value, dict) and set(value) == {"gradient"}:
        value = _gradient(value["gradient"], (*at, "value", "gradient"))
    elif isinstance(value, list) and lists_are_gradients:
        value = _gradient(value, (*at, "value"))
    elif isinstance(value, list | dict):
        raise SettingError((*at, "value"), f"must be one value or {{gradient: [...]}}, got {value!r}")
    return None if word in (None, "*") else word, value


def _gradient(values: Any, keys: tuple[str | int, ...]) -> Gradient:
    if not isinstance(values, list) or not values:
        raise SettingError(keys, f"must be a list of values over the depth, got {values!r}")
    return Gradient(_scalars(values, keys))


def _scalars(values: list[Any], keys: tuple[str | int, ...]) -> tuple[Scalar, ...]:
    for index, value in enumerate(values):
        if isinstance(value, list | dict):
            raise SettingError((*keys, index), f"must be one value, got {value!r}")
    return tuple(values)
