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
from weightsmith.tensors.blend import scaled

_SIGN_BIT = np.int32(-0x80000000)


def elect(
    changes: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    normalize: bool,
    zeros_negative: bool,
    scratch: Scratch,
) -> np.ndarray:
    """The elected mean (or sum) of T changes.

    Args:
        changes: T arrays fp32 (n,), entries that take no part at 0. Overwritten.
        weights: T numbers; a negative one turns its model's vote round.
        normalize: Divide by the weight of the models that agree.
        zeros_negative: Elect minus where the votes cancel.
        scratch: Buffers of the worker.

    Returns:
        fp32 (n,), a scratch buffer.
    """
    numel = changes[0].size
    # Equal weights cancel in a mean: the votes are counted (in one byte) instead of weighed.
    equal = len(set(weights)) == 1 and weights[0] > 0 and len(weights) < 256
    if not equal:
        for change, weight in zip(changes, weights, strict=True):
            scaled(change, weight)
    sign = vote(changes, scratch).view(np.int32)
    if zeros_negative:
        np.subtract(sign, np.int32(1), out=sign)
    np.bitwise_and(sign, _SIGN_BIT, out=sign)

    total = scratch.get("elected", numel)
    divisor = _Divisor(numel, None if equal else weights, scratch) if normalize else None
    for index, change in enumerate(changes):
        # With the elected sign taken out, those who agree are the positive ones.
        words = change.view(np.int32)
        np.bitwise_xor(words, sign, out=words)
        np.maximum(change, scratch.zeros(numel), out=change)
        if index == 0:
            np.copyto(total, change)
        else:
            np.add(total, change, out=total)
        if divisor is not None:
            divisor.add(index, change)
    words = total.view(np.int32)
    np.bitwise_xor(words, sign, out=words)
    if divisor is not None:
        np.divide(total, divisor.finish(), out=total)
    elif equal:
        scaled(total, weights[0])
    return total


def vote(changes: Sequence[np.ndarray], scratch: Scratch) -> np.ndarray:
    """The sum of the changes, in a scratch buffer; its signs are the election's."""
    votes = scratch.get("votes", changes[0].size)
    if len(changes) == 1:
        np.copyto(votes, changes[0])
        return votes
    np.add(changes[0], changes[1], out=votes)
    for change in changes[2:]:
        np.add(votes, change, out=votes)
    return votes


def vote_balance(changes: Sequence[np.ndarray], weights: Sequence[float], scratch: Scratch) -> int:
    """Number of entries with a positive sum less those with a negative one."""
    if len(set(weights)) > 1 or weights[0] < 0:
        for change, weight in zip(changes, weights, strict=True):
            scaled(change, weight)
    votes = vote(changes, scratch)
    flags = scratch.get("flags", votes.size, np.bool_)
    positive = np.count_nonzero(np.greater(votes, np.float32(0), out=flags))
    return int(positive) - int(np.count_nonzero(np.less(votes, np.float32(0), out=flags)))


class _Divisor:
    """The weight of the models that agree, per entry: a count where weights are equal."""

    def __init__(self, numel: int, weights: Sequence[float] | None, scratch: Scratch) -> None:
        self._weights = weights
        self._flags = scratch.get("flags", numel, np.bool_)
        self._work = scratch.get("agreeing", numel)
        self._weight = scratch.get("agree", numel, np.uint8 if weights is None else np.float32)
        self._weight[:] = 0

    def add(self, index: int, agreeing: np.ndarray) -> None:
        np.greater(agreeing, np.float32(0), out=self._flags)
        if self._weights is None:
            np.add(self._weight, self._flags.view(np.uint8), out=self._weight)
        else:
            np.multiply(self._flags, np.float32(self._weights[index]), out=self._work)
            np.add(self._weight, self._work, out=self._weight)

    def finish(self) -> np.ndarray:
        """The divisor, 1 where nobody agrees or the weights cancel."""
        np.equal(self._weight, self._weight.dtype.type(0), out=self._flags)
        np.add(self._weight, self._flags.view(np.uint8), out=self._weight)
        np.copyto(self._work, self._weight)
        return self._work
