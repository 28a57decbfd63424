"""One page, every merge method that applies: checkpoints side by side, and what tells them apart.

variants   the page as each method takes it, or why it can't
apart      one merge in a process of its own, so that its time and memory are its own
judging    one result against the base and every model, in one pass
scores     what models are scored on, and what is better
run        all of it into a folder; a killed run goes on
costs      what that would take
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.merging.comparison.costs import CostOfComparison, predict_comparison
    from weightsmith.merging.comparison.run import Comparison, compare
    from weightsmith.merging.comparison.variants import with_method

_HOMES = {
    "Comparison": "run",
    "CostOfComparison": "costs",
    "compare": "run",
    "predict_comparison": "costs",
    "with_method": "variants",
}

__all__ = ["Comparison", "CostOfComparison", "compare", "predict_comparison", "with_method"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
