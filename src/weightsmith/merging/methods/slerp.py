"""SLERP: two checkpoints blended along the arc between them, so that the norm is kept.

Problem  The straight mean of two weight vectors is shorter than both; a blend along the arc is not.
Rule     cos(omega) = <a, b> / (|a| |b|), one angle for each tensor
         theta = sin((1 - t) omega) / sin(omega) * a + sin(t omega) / sin(omega) * b
         a straight blend where |cos(omega)| > 0.9995, or where a tensor is all zeros
Source   Shoemake, "Animating rotation with quaternion curves", 1985; per tensor as mergekit has it. `t` is
         0 at the base (or the first model) and 1 at the other.
Cost     Two passes, about 3 ns an element in bfloat16 on one core.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.merging.sums import piece_dots, total
from weightsmith.tensors.blend import weighted_sum

STRAIGHT_ABOVE = 0.9995


@dataclass(frozen=True, kw_only=True)
class Slerp:
    """Spherical blend of exactly two models; a base counts as the first of them.

    Attributes:
        t: Position on the arc, in [0, 1]: 0 is the first model.
    """

    t: float = 0.5

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    base_is_model: ClassVar[bool] = True
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        check_range("t", self.t, 0, 1)

    def survey(self, parameter: Parameter) -> tuple[float, float]:
        """The factors of the two models."""
        dots: list[list[np.ndarray]] = [[], [], []]
        for tile in parameter.tiles():
            a, b = tile.models
            for pieces, (x, y) in zip(dots, ((a, a), (b, b), (a, b)), strict=True):
                pieces.append(piece_dots(x, y, parameter))
        aa, bb, ab = map(total, dots)
        return factors(self.t, ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 1.0)

    def merge_tile(self, tile: Tile, stats: tuple[float, float]) -> np.ndarray:
        """The blend, fp32 (n,)."""
        return weighted_sum(tile.models, stats)


def factors(t: float, cosine: float) -> tuple[float, float]:
    """What the two ends of the arc are multiplied by.

    Example:
        >>> factors(0.5, 0.0)  # a right angle: both by 1 / sqrt(2)
        (0.7071067811865475, 0.7071067811865475)
        >>> factors(0.25, 1.0)
        (0.75, 0.25)
    """
    if abs(cosine) > STRAIGHT_ABOVE:
        return 1.0 - t, t
    omega = math.acos(cosine)
    return math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
