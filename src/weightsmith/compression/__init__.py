"""Compression: one checkpoint into a smaller one. Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.compression.nm import (
        MagnitudeOptions,
        MaskProConfig,
        MaskProPruner,
        RIAOptions,
        SparseGPTOptions,
        SparseSwapsOptions,
        WandaOptions,
        freeze_mask_,
        load_semi_structured,
        prune_,
        prune_checkpoint,
        read_masks,
        write_pruned,
    )
    from weightsmith.compression.tailoring.baselines import (
        angular_block,
        block_influence,
        greedy,
        laco,
        shortgpt,
    )
    from weightsmith.compression.tailoring.options import TailorOptions
    from weightsmith.compression.tailoring.plan import TailorPlan
    from weightsmith.compression.tailoring.search import TailorSearch

_HOMES = {
    "MagnitudeOptions": "nm",
    "MaskProConfig": "nm",
    "MaskProPruner": "nm",
    "RIAOptions": "nm",
    "SparseGPTOptions": "nm",
    "SparseSwapsOptions": "nm",
    "TailorOptions": "tailoring.options",
    "TailorPlan": "tailoring.plan",
    "TailorSearch": "tailoring.search",
    "WandaOptions": "nm",
    "angular_block": "tailoring.baselines",
    "block_influence": "tailoring.baselines",
    "freeze_mask_": "nm",
    "greedy": "tailoring.baselines",
    "laco": "tailoring.baselines",
    "load_semi_structured": "nm",
    "prune_": "nm",
    "prune_checkpoint": "nm",
    "read_masks": "nm",
    "shortgpt": "tailoring.baselines",
    "write_pruned": "nm",
}

__all__ = [
    "MagnitudeOptions",
    "MaskProConfig",
    "MaskProPruner",
    "RIAOptions",
    "SparseGPTOptions",
    "SparseSwapsOptions",
    "TailorOptions",
    "TailorPlan",
    "TailorSearch",
    "WandaOptions",
    "angular_block",
    "block_influence",
    "freeze_mask_",
    "greedy",
    "laco",
    "load_semi_structured",
    "prune_",
    "prune_checkpoint",
    "read_masks",
    "shortgpt",
    "write_pruned",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
