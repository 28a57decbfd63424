"""Several checkpoints into one: the streaming engine and one file per merge method.

Names load on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.merging.api import MergeReport, average, merge, plan_merge
    from weightsmith.merging.config import MergeConfig, parse_merge, read_merge_page
    from weightsmith.merging.diagnostics import diagnose
    from weightsmith.merging.measuring import measure
    from weightsmith.merging.mediator import (
        Mediator,
        MediatorConfig,
        RouterConfig,
        build_mediator,
        conflict_profile,
        plan_mediator,
    )
    from weightsmith.merging.memory import merge_state_dicts, merge_tensors
    from weightsmith.merging.plan import MergePlan

_HOMES = {
    "plan_mediator": "mediator",
    "conflict_profile": "mediator",
    "build_mediator": "mediator",
    "RouterConfig": "mediator",
    "MediatorConfig": "mediator",
    "Mediator": "mediator",
    "MergeConfig": "config",
    "MergePlan": "plan",
    "MergeReport": "api",
    "average": "api",
    "diagnose": "diagnostics",
    "measure": "measuring",
    "merge": "api",
    "merge_state_dicts": "memory",
    "merge_tensors": "memory",
    "parse_merge": "config",
    "plan_merge": "api",
    "read_merge_page": "config",
}

__all__ = [
    "Mediator",
    "MediatorConfig",
    "MergeConfig",
    "MergePlan",
    "MergeReport",
    "RouterConfig",
    "average",
    "build_mediator",
    "conflict_profile",
    "diagnose",
    "measure",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "parse_merge",
    "plan_mediator",
    "plan_merge",
    "read_merge_page",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
