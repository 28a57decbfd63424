"""Multi-SLERP: the mean direction of several models (or of their changes), at their mean length.

Problem  SLERP takes two models; the straight mean of more that point different ways is too short.
Rule     Per tensor: x_t = theta_t, or theta_t - theta_0 with a base; u_t = x_t / |x_t|
         m = sum_t w_t u_t;   theta = (theta_0 +) (sum_t w_t |x_t|) * m / |m|     weights divided by their sum
Source   Goddard, "Multi-SLERP" (goddard.blog, 2025), as mergekit has it. There the u_t are also projected to
         the tangent plane at m / |m|, averaged and projected back; that average is m less its part along m,
         which is 0, so the step moves nothing but rounding and is left out.
Decided  Where the u_t cancel (|m| near 0) no direction is left and the blend is straight, for any number of
         models; mergekit stops there with more than two. One model is itself.
Cost     Two passes; dot products in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.angles import combined, gram
from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile

_CANCELLED = 1e-7
"""Length of a mean of unit vectors that is rounding."""


@dataclass(frozen=True, kw_only=True)
class MultiSlerp:
    """Mean direction at mean length.

    Attributes:
        weight: Weight of each model.
        normalize_weights: Divide the weights by their sum.
        eps: Added to lengths before they divide.
    """

    weight: PerModel = 1.0
    normalize_weights: bool = True
    eps: float = 1e-8

    base: ClassVar[Literal["required", "optional", "none"]] = "optional"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_range("weight", self.weight)
        check_range("eps", self.eps, 0, open_low=True)
        if self.normalize_weights and isinstance(self.weight, tuple) and sum(self.weight) == 0:
            problem = f"weights {list(self.weight)} sum to 0; set `normalize_weights: false`"
            raise OptionError("weight", problem)

    def survey(self, parameter: Parameter) -> tuple[float, ...]:
        """What each model, or its change, is multiplied by."""
        assert isinstance(self.weight, tuple)
        if parameter.num_models == 1:
            return (1.0,)
        divisor = sum(self.weight) if self.normalize_weights else 1.0
        return multislerp_coefficients(gram(parameter), np.array(self.weight) / divisor, self.eps)

    def merge_tile(self, tile: Tile, stats: tuple[float, ...]) -> np.ndarray:
        """The blend, fp32 (n,)."""
        return combined(tile, stats)


def multislerp_coefficients(gram_TT: np.ndarray, weights: np.ndarray, eps: float = 1e-8) -> tuple[float, ...]:
    """What each of T vectors is multiplied by.

    Args:
        gram_TT: Their dot products, fp64 (T, T).
        weights: fp64 (T,).
        eps: Added to lengths before they divide.

    Example:
        >>> multislerp_coefficients(np.eye(2), np.array([0.5, 0.5]))  # a right angle, as SLERP
        (0.7071067811865475, 0.7071067811865475)
    """
    lengths = np.sqrt(np.maximum(gram_TT.diagonal(), 0.0))
    shares = weights / (lengths + eps)
    length = float(np.sqrt(max(shares @ gram_TT @ shares, 0.0)))
    if length < max(eps, _CANCELLED):
        return tuple(weights.tolist())
    return tuple((float(weights @ lengths) / length * shares).tolist())
