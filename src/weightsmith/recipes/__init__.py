"""A page of YAML -> validated stages -> a run that can be stopped at any moment and goes on.

Names load on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.recipes.executors import Inline, Processes
    from weightsmith.recipes.page import Page, load_page
    from weightsmith.recipes.plan import RunPlan, StagePlan, plan_run
    from weightsmith.recipes.runner import RunFailed, RunResult, StageResult, run_recipe

_HOMES = {
    "Inline": "executors",
    "Page": "page",
    "Processes": "executors",
    "RunFailed": "runner",
    "RunPlan": "plan",
    "RunResult": "runner",
    "StagePlan": "plan",
    "StageResult": "runner",
    "load_page": "page",
    "plan_run": "plan",
    "run_recipe": "runner",
}

__all__ = [
    "Inline",
    "Page",
    "Processes",
    "RunFailed",
    "RunPlan",
    "RunResult",
    "StagePlan",
    "StageResult",
    "load_page",
    "plan_run",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
