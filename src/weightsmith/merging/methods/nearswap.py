"""NearSwap: take the other model's weights where they are near the base's, at most `t` away elsewhere.

Problem  A second model's flavour without its disagreements: where both nearly agree its weights are taken,
         far ones move the base by a step only.
Rule     w = min(1, t / |theta_1 - theta_0|);   theta = w theta_1 + (1 - w) theta_0
         which is theta_0 + (theta_1 - theta_0 cut to [-t, t])
Source   alchemonaut, QuartetAnemoi-70B-t0.0001 (model card), whose t is the default; mergekit's `nearswap`,
         where t below 1e-6 also shrinks changes smaller than that.
Cost     One pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, Tile


@dataclass(frozen=True, kw_only=True)
class NearSwap:
    """Base plus the cut change of exactly one model.

    Attributes:
        t: Largest change of a weight, from 0 on.
    """

    t: float = 1e-4

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        check_range("t", self.t, 0)

    def survey(self, parameter: Parameter) -> None:
        """Nothing to know beforehand."""

    def merge_tile(self, tile: Tile, stats: None) -> np.ndarray:
        """Base plus the cut change, fp32 (n,)."""
        assert tile.base is not None
        (change,) = tile.deltas()
        np.clip(change, np.float32(-self.t), np.float32(self.t), out=change)
        return np.add(tile.base, change, out=change)
