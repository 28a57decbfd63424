"""RAM+ (tensor-local): as RAM, with changes that one model alone made strengthened.

Problem  As in RAM; the more of a model's changes are shared and so averaged, the weaker what is its own
         becomes against them.
Rule     mask_t, c as in `ram`; per tensor and model
         rho_t = number of its changes with c > 1 / number with c = 1;   s_t = 1 + r min(rho_t, alpha)
         theta = theta_0 + (s_t (theta_t - theta_0) where t alone changed a weight, else RAM's mean)
Source   "Reinforced Agent Merging", arXiv:2601.13572 (RAM+), counted in each tensor as mergekit has it.
Cost     Two passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weightsmith.merging.methods.ram import Ram, real_changes
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.tensors.blend import summed


@dataclass(frozen=True, kw_only=True)
class RamPlus(Ram):
    """Mean over those who changed a weight, lone changes strengthened.

    Attributes:
        r: Strength of lone changes.
        alpha: Ratio of shared to lone changes beyond which they grow no more.
    """

    r: float = 0.1
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("r", self.r)
        check_range("alpha", self.alpha, 0)

    def survey(self, parameter: Parameter) -> tuple[float, ...]:
        """What each model's lone changes are multiplied by."""
        shared, lone = np.zeros(parameter.num_models), np.zeros(parameter.num_models)
        for tile in parameter.tiles():
            flags, count = real_changes(tile.deltas(), self.epsilon, tile)
            shared += np.count_nonzero(flags & (count > 1), axis=1)
            lone += np.count_nonzero(flags & (count == 1), axis=1)
        ratio = np.divide(shared, lone, out=np.full_like(shared, np.inf), where=lone > 0)
        return tuple((1.0 + self.r * np.minimum(ratio, self.alpha)).tolist())

    def merge_tile(self, tile: Tile, stats: tuple[float, ...]) -> np.ndarray:
        """Base plus the merged change, fp32 (n,)."""
        assert tile.base is not None
        deltas = tile.deltas()
        flags, count = real_changes(deltas, self.epsilon, tile)
        factor = np.divide(np.float32(1), np.maximum(count, 1))
        alone = count == 1
        for flag, strength in zip(flags, stats, strict=True):
            np.copyto(factor, np.float32(strength), where=np.logical_and(flag, alone, out=flag))
        change = summed(deltas, deltas[0])
        np.multiply(change, factor, out=change)
        return np.add(tile.base, change, out=change)
