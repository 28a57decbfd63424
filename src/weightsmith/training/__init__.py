"""Parts that work inside a training loop, and the loop behind the stages `train` and `finetune`.

Names load on first use: importing the room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.training.config import FinetuneConfig, TrainConfig
    from weightsmith.training.loop import TrainResult, finetune, train
    from weightsmith.training.planning import TrainPlan, plan
    from weightsmith.training.sources import DataSource

_HOMES = {
    "DataSource": "sources",
    "FinetuneConfig": "config",
    "TrainConfig": "config",
    "TrainPlan": "planning",
    "TrainResult": "loop",
    "finetune": "loop",
    "plan": "planning",
    "train": "loop",
}

__all__ = [
    "DataSource",
    "FinetuneConfig",
    "TrainConfig",
    "TrainPlan",
    "TrainResult",
    "finetune",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
