"""Weighted sums of bfloat16 arrays, two neighbours to a word.

Problem  The mean of bfloat16 models is bound by passes over tiles, and half of the passes only move 16 bits
         into 32 and back.
Method   Two neighbours are one 32-bit word: a mask makes the upper one a float32, a shift the lower one. All
         lower ones and all upper ones are summed and rounded apart, through one buffer that stays in the
         cache, and put together again.
Result   The bits of `to_float32`, `blend.weighted_sum` and `from_float32`: each element meets the same
         operations in the same order.
Cost     A sixth less than those three steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from weightsmith.tensors.blend import scaled

_UPPER = np.uint32(0xFFFF0000)
# Stored bits of infinity; those of NaN are larger.
_INFINITE = 0x7F80


def weighted_sum_bfloat16(
    rows: Iterable[np.ndarray],
    weights: Sequence[float],
    divisor: float,
    out: np.ndarray,
    buffer: Callable[[str, int], np.ndarray],
) -> bool:
    """`out = sum_t weights[t] * rows[t] / divisor` in float32, rounded to nearest, ties to even.

    Args:
        rows: T contiguous arrays of stored bits, uint16 (n,), n even. Each is done with before the next is
            asked for, so all may be one buffer.
        weights: T finite numbers.
        divisor: Not 0.
        out: uint16 (n,).
        buffer: Gives fp32 memory by name and size.

    Returns:
        Whether all sums are finite. A sum that has a NaN or an infinity in it is not.
    """
    half = out.size // 2
    sums, more = buffer("pairs", out.size), buffer("more of a half", half)
    lower, upper = sums[:half], sums[half:]
    low_bits, high_bits, more_bits = (values.view(np.uint32) for values in (lower, upper, more))
    equal = len(set(weights)) == 1
    for place, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        words = row.view(np.uint32)
        if place == 0:
            np.left_shift(words, 16, out=low_bits)
            np.bitwise_and(words, _UPPER, out=high_bits)
            if not equal:
                scaled(sums, weight, divisor)
            continue
        for total, widened, operand in ((lower, np.left_shift, 16), (upper, np.bitwise_and, _UPPER)):
            widened(words, operand, out=more_bits)
            if not equal:
                scaled(more, weight, divisor)
            np.add(total, more, out=total)
    if equal:
        scaled(sums, weights[0], divisor)
    for bits in (low_bits, high_bits):
        np.right_shift(bits, 16, out=more_bits)
        np.bitwise_and(more_bits, 1, out=more_bits)
        np.add(more_bits, 0x7FFF, out=more_bits)
        np.add(bits, more_bits, out=bits)
    np.right_shift(low_bits, 16, out=low_bits)
    np.bitwise_and(high_bits, _UPPER, out=high_bits)
    np.bitwise_or(low_bits, high_bits, out=out.view(np.uint32))
    return all_finite(out)


def all_finite(bits: np.ndarray) -> bool:
    """Whether stored bfloat16 (uint16, any shape) hold neither NaN nor infinity."""
    # Read as signed, positive numbers keep their order; unsigned, negative ones are the largest.
    return bits.size == 0 or bool(bits.view(np.int16).max() < _INFINITE and bits.max() < _INFINITE + 0x8000)
