"""Weighted sums of arrays in place: the arithmetic that merging, averaging and tailoring share.

Equal weights are factored out, so that a plain mean costs one addition an array and one division, and the
mean of identical arrays is that array (for up to eight of them in bfloat16 exactly).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def weighted_sum(
    values: Sequence[np.ndarray] | np.ndarray, weights: Sequence[float], divisor: float = 1.0
) -> np.ndarray:
    """`sum_t weights[t] * values[t] / divisor`, computed in the buffers of `values`.

    Args:
        values: T arrays of one shape, fp32, or one whose rows they are. Overwritten.
        weights: T finite numbers.
        divisor: Not 0.

    Returns:
        `values[0]`, holding the sum.
    """
    if len(set(weights)) == 1:
        return scaled(summed(values, values[0]), weights[0], divisor)
    for value, weight in zip(values, weights, strict=True):
        scaled(value, weight, divisor)
    return summed(values, values[0])


def summed(values: Sequence[np.ndarray] | np.ndarray, out: np.ndarray) -> np.ndarray:
    """The sum of arrays in their order, in `out` (which may be the first of them)."""
    if len(values) == 1:
        np.copyto(out, values[0])
        return out
    np.add(values[0], values[1], out=out)
    for value in values[2:]:
        np.add(out, value, out=out)
    return out


def scaled(values: np.ndarray, factor: float, divisor: float = 1.0) -> np.ndarray:
    """`values * factor / divisor` in place; costs nothing where that is 1."""
    if factor == divisor:
        return values
    if factor == 1.0:
        return np.divide(values, np.float32(divisor), out=values)
    return np.multiply(values, np.float32(factor / divisor), out=values)
