"""N:M masks: keep N weights in every M consecutive inputs.

Names load on first use, so that importing the room costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.compression.nm.distribution import nm_logprob, nm_score
    from weightsmith.compression.nm.files import read_masks, write_masks
    from weightsmith.compression.nm.folders import PruneReport, prune_checkpoint
    from weightsmith.compression.nm.freeze import FrozenMask, freeze_mask_
    from weightsmith.compression.nm.magnitude import magnitude_scores
    from weightsmith.compression.nm.maskpro import MaskProPruner, MaskProReport
    from weightsmith.compression.nm.masks import nm_mask, repair_mask
    from weightsmith.compression.nm.oneshot import Mask, Masks, prune_
    from weightsmith.compression.nm.options import (
        MagnitudeOptions,
        MaskProConfig,
        NMOptions,
        RIAOptions,
        SparseGPTOptions,
        SparseSwapsOptions,
        WandaOptions,
    )
    from weightsmith.compression.nm.packed import load_semi_structured
    from weightsmith.compression.nm.pattern import Pattern
    from weightsmith.compression.nm.ria import ria_scores
    from weightsmith.compression.nm.sampling import sample_nm
    from weightsmith.compression.nm.semi_structured import to_semi_structured_
    from weightsmith.compression.nm.sparsegpt import sparsegpt_prune
    from weightsmith.compression.nm.sparseswaps import sparseswaps_mask
    from weightsmith.compression.nm.wanda import wanda_scores
    from weightsmith.compression.nm.write import write_pruned

_HOMES = {
    "FrozenMask": "freeze",
    "MagnitudeOptions": "options",
    "Mask": "oneshot",
    "MaskProConfig": "options",
    "MaskProPruner": "maskpro",
    "MaskProReport": "maskpro",
    "Masks": "oneshot",
    "NMOptions": "options",
    "Pattern": "pattern",
    "PruneReport": "folders",
    "RIAOptions": "options",
    "SparseGPTOptions": "options",
    "SparseSwapsOptions": "options",
    "WandaOptions": "options",
    "freeze_mask_": "freeze",
    "load_semi_structured": "packed",
    "magnitude_scores": "magnitude",
    "nm_logprob": "distribution",
    "nm_mask": "masks",
    "nm_score": "distribution",
    "prune_": "oneshot",
    "prune_checkpoint": "folders",
    "read_masks": "files",
    "repair_mask": "masks",
    "ria_scores": "ria",
    "sample_nm": "sampling",
    "sparsegpt_prune": "sparsegpt",
    "sparseswaps_mask": "sparseswaps",
    "to_semi_structured_": "semi_structured",
    "wanda_scores": "wanda",
    "write_masks": "files",
    "write_pruned": "write",
}

__all__ = [
    "FrozenMask",
    "MagnitudeOptions",
    "Mask",
    "MaskProConfig",
    "MaskProPruner",
    "MaskProReport",
    "Masks",
    "NMOptions",
    "Pattern",
    "PruneReport",
    "RIAOptions",
    "SparseGPTOptions",
    "SparseSwapsOptions",
    "WandaOptions",
    "freeze_mask_",
    "load_semi_structured",
    "magnitude_scores",
    "nm_logprob",
    "nm_mask",
    "nm_score",
    "prune_",
    "prune_checkpoint",
    "read_masks",
    "repair_mask",
    "ria_scores",
    "sample_nm",
    "sparsegpt_prune",
    "sparseswaps_mask",
    "to_semi_structured_",
    "wanda_scores",
    "write_masks",
    "write_pruned",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
