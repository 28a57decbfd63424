"""Sign election: where task vectors disagree, the side with more mass wins and its mean is taken.

    s = sgn(sum_t v_t),   v_t = weight_t * change_t
    merged = sum of the v_t with sgn(v_t) = s, divided by their weight_t (`normalize` false: not)

Entries whose sum is exactly 0 need a rule: TIES's reference gives them the sign that most entries of the
whole model have, mergekit calls them positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith.merging.parameter import Scratch
from weightsmith.tensors.blend import scaled, summed

_SIGN_BIT = np.int32(-0x80000000)


def elect(
    changes: np.ndarray,
    weights: Sequence[float],
    *,
    normalize: bool,
    zeros_negative: bool,
    scratch: Scratch,
    weigh_votes: bool = True,
) -> np.ndarray:
    """The elected mean (or sum) of T changes.

    Args:
        changes: fp32 (T, n), entries that take no part at 0. Overwritten.
        weights: T numbers; a negative one turns its model's vote round.
        normalize: Divide by the weight of the models that agree.
        zeros_negative: Elect minus where the votes cancel.
        scratch: Buffers of the worker.
        weigh_votes: Votes are weight times change; else the changes alone, and weights may not be negative.

    Returns:
        fp32 (n,), a scratch buffer.
    """
    numel = changes.shape[1]
    # Equal weights cancel in a mean: the votes are counted (in one byte) instead of weighed.
    equal = len(set(weights)) == 1 and weights[0] > 0 and len(weights) < 256
    if not equal and weigh_votes:
        for change, weight in zip(changes, weights, strict=True):
            scaled(change, weight)
    sign = summed(changes, scratch.get("votes", numel)).view(np.int32)
    if zeros_negative:
        np.subtract(sign, np.int32(1), out=sign)
    np.bitwise_and(sign, _SIGN_BIT, out=sign)

    # With the elected sign taken out, those who agree are the positive ones.
    words = changes.view(np.int32)
    np.bitwise_xor(words, sign, out=words)
    if not equal and not weigh_votes:
        for change, weight in zip(changes, weights, strict=True):
            scaled(change, weight)
    np.maximum(changes, scratch.filled(0.0, numel), out=changes)
    divisor = _divisor(changes, None if equal else weights, scratch) if normalize else None
    total = summed(changes, changes[0])
    words = total.view(np.int32)
    np.bitwise_xor(words, sign, out=words)
    if divisor is not None:
        np.divide(total, divisor, out=total)
    elif equal:
        scaled(total, weights[0])
    return total


def vote_balance(changes: np.ndarray, weights: Sequence[float], scratch: Scratch) -> int:
    """Number of entries with a positive sum less those with a negative one."""
    if len(set(weights)) > 1 or weights[0] < 0:
        for change, weight in zip(changes, weights, strict=True):
            scaled(change, weight)
    votes = summed(changes, scratch.get("votes", changes.shape[1]))
    flags = scratch.get("flags", votes.size, np.bool_)
    positive = np.count_nonzero(np.greater(votes, np.float32(0), out=flags))
    return int(positive) - int(np.count_nonzero(np.less(votes, np.float32(0), out=flags)))


def _divisor(agreeing: np.ndarray, weights: Sequence[float] | None, scratch: Scratch) -> np.ndarray:
    """The weight of the models whose entry is positive, fp32 (n,): a count where `weights` is None.

    It is 1 where nobody agrees or the weights cancel.
    """
    numel = agreeing.shape[1]
    flags = scratch.get("flags", agreeing.size, np.bool_).reshape(agreeing.shape)
    np.greater(agreeing, np.float32(0), out=flags)
    weight = scratch.get("agreeing", numel)
    if weights is None:
        count = summed(flags.view(np.uint8), scratch.get("agree", numel, np.uint8))
        np.add(count, np.equal(count, np.uint8(0), out=flags[0]).view(np.uint8), out=count)
        np.copyto(weight, count)
        return weight
    work = scratch.get("votes of one", numel)
    weight[:] = 0
    for flag, one in zip(flags, weights, strict=True):
        np.add(weight, np.multiply(flag, np.float32(one), out=work), out=weight)
    nobody = flags[0]
    np.equal(weight, np.float32(0), out=nobody)
    return np.add(weight, nobody.view(np.uint8), out=weight)
