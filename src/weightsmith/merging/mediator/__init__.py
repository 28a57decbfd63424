"""Mediator: average the blocks on which fine-tunes agree, route those on which they conflict.

Names load on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.merging.mediator.build import BuildReport, build_mediator
    from weightsmith.merging.mediator.export import export_merged
    from weightsmith.merging.mediator.model import Mediator
    from weightsmith.merging.mediator.options import MediatorConfig, RouterConfig
    from weightsmith.merging.mediator.plan import MediatorPlan, plan_mediator, split_blocks
    from weightsmith.merging.mediator.profile import Profile, conflict_profile
    from weightsmith.merging.mediator.router import Router, RoutingDecision
    from weightsmith.merging.mediator.store import MediatorStore

_HOMES = {
    "Mediator": "model",
    "Router": "router",
    "RoutingDecision": "router",
    "BuildReport": "build",
    "MediatorStore": "store",
    "build_mediator": "build",
    "export_merged": "export",
    "MediatorConfig": "options",
    "MediatorPlan": "plan",
    "Profile": "profile",
    "RouterConfig": "options",
    "conflict_profile": "profile",
    "plan_mediator": "plan",
    "split_blocks": "plan",
}

__all__ = [
    "BuildReport",
    "Mediator",
    "MediatorConfig",
    "MediatorPlan",
    "MediatorStore",
    "Profile",
    "Router",
    "RouterConfig",
    "RoutingDecision",
    "build_mediator",
    "conflict_profile",
    "export_merged",
    "plan_mediator",
    "split_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
