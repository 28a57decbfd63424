"""Safer and more balanced behaviour: mixtures of preference data. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.alignment.mixtures import (
        Mixture,
        armorm_mixture,
        heuristic_mixture,
        hummer_mixture,
        hummer_weights,
    )

_HOMES = {
    "Mixture": "mixtures",
    "armorm_mixture": "mixtures",
    "heuristic_mixture": "mixtures",
    "hummer_mixture": "mixtures",
    "hummer_weights": "mixtures",
}

__all__ = ["Mixture", "armorm_mixture", "heuristic_mixture", "hummer_mixture", "hummer_weights"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
