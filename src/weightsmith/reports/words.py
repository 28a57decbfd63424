"""The parts of a training in few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PART_KEYS = ("optimizer", "clip", "decay", "sharpness", "average", "objective", "adapter")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "optimizer": (None,),
    "clip": (None, {"global": 1.0}, "global"),
    "decay": (None, "uniform"),
    "sharpness": (None, "off"),
    "average": (None, "off", "keep"),
    "objective": (None, "ntp"),
    "adapter": (None, "none"),
}


def part_words(config: Mapping[str, Any]) -> dict[str, str]:
    """Key -> `adagc (init ema)` for each of these keys that isn't as every plain run has it."""
    found = {}
    for key in PART_KEYS:
        value = config.get(key)
        if value in _PLAIN[key] or (key == "average" and isinstance(value, Mapping) and "keep" in value):
            continue
        words = choice_words(value)
        if words == "off":
            words = f"no {key}"
        found[key] = words.replace("global", "clip at") if choice_name(value) == "global" else words
    return found


def choice_words(value: Any) -> str:
    """`sewa (num select 5)` for `{"sewa": {"num_select": 5}}`."""
    if not isinstance(value, Mapping):
        return str(value)
    ((name, options),) = value.items()
    if not isinstance(options, Mapping):
        return f"{name} {options}"
    words = ", ".join(f"{key.replace('_', ' ')} {option}" for key, option in options.items())
    return f"{name} ({words})" if words else str(name)


def choice_name(value: Any) -> str:
    """`sewa` for `{"sewa": {...}}` and for `sewa`."""
    return str(next(iter(value), "")) if isinstance(value, Mapping) else str(value or "")
