"""RAM: mean of the changes over the models that really changed a weight.

Problem  Agents tuned by reinforcement learning change few weights each; the mean over all models dilutes
         what only one of them learned.
Rule     mask_t = |theta_t - theta_0| > epsilon;   c = number of masks that are set
         theta = theta_0 + sum_t mask_t (theta_t - theta_0) / max(c, 1)
Source   "Reinforced Agent Merging", arXiv:2601.13572, as mergekit has it.
Cost     One pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.tensors.blend import summed


@dataclass(frozen=True, kw_only=True)
class Ram:
    """Mean over those who changed a weight.

    Attributes:
        epsilon: Changes up to this size count as none.
    """

    epsilon: float = 1e-5

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, 0)

    def survey(self, parameter: Parameter) -> Any:
        """Nothing to know beforehand."""

    def merge_tile(self, tile: Tile, stats: Any) -> np.ndarray:
        """Base plus the mean of real changes, fp32 (n,)."""
        assert tile.base is not None
        deltas = tile.deltas()
        _, count = real_changes(deltas, self.epsilon, tile)
        change = summed(deltas, deltas[0])
        np.divide(change, np.maximum(count, 1), out=change)
        return np.add(tile.base, change, out=change)


def real_changes(deltas: np.ndarray, epsilon: float, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Which changes exceed `epsilon` and how many models have one there; the others are set to 0, in place.

    Args:
        deltas: fp32 (T, n).
        epsilon: Changes up to this size count as none.
        tile: Where they are.

    Returns:
        bool (T, n) in a scratch buffer, and fp32 (n,).
    """
    sizes = np.abs(deltas, out=tile.scratch.get("sizes", deltas.size).reshape(deltas.shape))
    flags = tile.scratch.get("flags", deltas.size, np.bool_).reshape(deltas.shape)
    np.greater(sizes, np.float32(epsilon), out=flags)
    np.multiply(deltas, flags, out=deltas)
    return flags, np.asarray(np.sum(flags, axis=0, dtype=np.float32))
