"""The choice of `masking` in NumPy, which has in-place arithmetic and a faster selection than torch on a CPU:
of rows of one length, and of runs of any lengths that lie behind one another.

Letters  B rows, T places of a row, R runs (of one length or of several), N places of all runs
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
NEVER = (1 << 63) - 1  # the key of a place that is not eligible
LOWEST = -(1 << 63)
_BLOCK = 1 << 16  # keys at a time
_SPARSE = 8  # times as many places as keys: more are not worth a matrix
_GOLDEN = np.uint64(GOLDEN)


def masked_count(eligible: int, ratio: float) -> int:
    """K for a number of eligible tokens; exact where a product such as 0.1 x 30 falls short of 3."""
    if eligible == 0 or ratio == 0:
        return 0
    return max(1, math.floor(ratio * eligible + 1e-9))


def masked_counts(eligible_R: np.ndarray, ratio: float) -> np.ndarray:
    """`masked_count` of each, int64, for a ratio that is not 0."""
    return np.minimum(np.maximum(1, np.floor(ratio * eligible_R + 1e-9)), eligible_R).astype(np.int64)


def chance(ratio: float) -> int:
    """What a key is below with probability `ratio`."""
    return math.floor(ratio * WORD) + LOWEST


def choose_in_rows(allowed: np.ndarray, ratio: float, seed: int, per_row: bool) -> np.ndarray:
    """Exactly that share of each row's allowed places, for a ratio between 0 and 1.

    Some rows at a time, in the same memory, which stays in the cache.

    Args:
        allowed: Bool (B, T).
        ratio: Share of them, at least one.
        seed: Decides which.
        per_row: Rows have keys of their own.

    Returns:
        int64: places in the flattened rows, in order.
    """
    rows, length = allowed.shape
    row_B = np.broadcast_to(_row_keys(rows if per_row else 1, seed), rows)
    place_T = np.arange(length, dtype=np.uint64) * _GOLDEN
    block = max(1, _BLOCK // length)
    memory, scratch = np.empty((2, min(block, rows), length), np.uint64)
    chosen = []
    for first in range(0, rows, block):
        some = allowed[first : first + block]
        unsigned = memory[: len(some)]
        np.add(row_B[first : first + block, None], place_T, out=unsigned)
        _mix(unsigned, scratch[: len(some)])
        keys, stop_B = unsigned.view(np.int64), np.arange(1, len(some) + 1) * length
        barred = np.flatnonzero(~some)
        keys.reshape(-1)[barred] = NEVER
        count_B = length - np.diff(np.searchsorted(barred, stop_B), prepend=0)
        chosen.append(first * length + _smallest(keys, count_B, stop_B, ratio))
    return np.concatenate(chosen)


def choose_in_runs(
    tokens: np.ndarray,
    begins: np.ndarray,
    counts: np.ndarray,
    ratio: float,
    seed: int,
    *,
    exact_count: bool = True,
) -> np.ndarray:
    """A random part of each run of tokens.

    Args:
        tokens: int64 (N,), in order: where the tokens of all runs are.
        begins: int64 (R,): where the row begins that a run is part of; what tells tokens of a run apart is
            how far behind it they are.
        counts: int64 (R,), how many of the tokens each run has.
        ratio: Share of them, at least one where `ratio` is not 0.
        seed: Decides which.
        exact_count: Exactly that share; otherwise that probability.

    Returns:
        int64: those of the tokens that are chosen, in order.
    """
    if ratio == 0 or not len(tokens):
        return tokens[:0]
    if ratio == 1:
        return tokens
    key_R = _row_keys(len(counts), seed) - begins.view(np.uint64) * _GOLDEN
    chosen = []
    for runs, own in _blocks(np.cumsum(counts)):
        some, count_R = tokens[own], counts[runs]
        unsigned = some.view(np.uint64) * _GOLDEN
        unsigned += np.repeat(key_R[runs], count_R)
        _mix(unsigned, np.empty_like(unsigned))
        keys = unsigned.view(np.int64)
        if exact_count:
            chosen.append(some[_smallest(keys, count_R, np.cumsum(count_R), ratio)])
        else:
            chosen.append(some.compress(keys < chance(ratio)))
    return np.concatenate(chosen)


def _blocks(stop_R: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Runs whose places fit the cache, and these places."""
    first = begin = 0
    while first < len(stop_R):
        last = max(first + 1, int(np.searchsorted(stop_R, begin + _BLOCK, side="right")))
        stop = int(stop_R[last - 1])
        yield slice(first, last), slice(begin, stop)
        first, begin = last, stop


def _row_keys(rows: int, seed: int) -> np.ndarray:
    keys = np.arange(1, rows + 1, dtype=np.uint64) * _GOLDEN + np.uint64(seed % WORD)
    _mix(keys, np.empty_like(keys))
    return keys


def _mix(state: np.ndarray, scratch: np.ndarray) -> None:
    """SplitMix64's output function, in place."""
    for shift, factor in ROUNDS:
        np.right_shift(state, np.uint64(shift), out=scratch)
        np.bitwise_xor(state, scratch, out=state)
        np.multiply(state, np.uint64(factor), out=state)
    np.right_shift(state, np.uint64(31), out=scratch)
    np.bitwise_xor(state, scratch, out=state)


def _smallest(keys: np.ndarray, count_R: np.ndarray, stop_R: np.ndarray, ratio: float) -> np.ndarray:
    """Where the smallest keys of each run are, that share of those which are not `NEVER`; in order, from 0 in
    all runs.

    Keys are uniform, so it is known below which one the last of the smallest almost surely is; only those
    below it are sorted.

    Args:
        keys: int64 (R, T), or (N,) for runs of several lengths.
        count_R: How many of each run's are not `NEVER`.
        stop_R: Where each run ends.
        ratio: Their share.
    """
    wanted_R = masked_counts(count_R, ratio)
    edge_R = _above(wanted_R, count_R)
    while True:
        is_low = keys <= (
            edge_R[:, None] if keys.ndim == 2 else np.repeat(edge_R, np.diff(stop_R, prepend=0))
        )
        low = np.flatnonzero(is_low)
        low_R = np.diff(np.searchsorted(low, stop_R), prepend=0)
        too_few = low_R < wanted_R
        if not too_few.any():
            break
        edge_R[too_few] = NEVER
    low_keys = keys.reshape(-1)[low]
    last_R = _sorted_at(wanted_R - 1, low_keys, low_R)
    # A fourth of the time that an index of bools takes.
    return low.compress(low_keys <= np.repeat(last_R, low_R))


def _above(wanted_B: np.ndarray, count_B: np.ndarray) -> np.ndarray:
    """Below which keys the K-th smallest of uniform ones almost surely is: four deviations above its mean."""
    share_B = wanted_B / np.maximum(count_B, 1)
    edge_B = share_B + 4 * np.sqrt(share_B * (1 - share_B) / np.maximum(count_B, 1))
    return ((np.minimum(edge_B, 1.0) * (WORD - 2048)).astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)


def _sorted_at(place_R: np.ndarray, keys: np.ndarray, size_R: np.ndarray) -> np.ndarray:
    """Of the first `size_R[0]` keys the one that is `place_R[0]`-th smallest, from 0; of the next ones the
    next; anything where there are none.
    """
    width = int(size_R.max(initial=0)) + 1
    if len(size_R) * width > _SPARSE * (len(keys) + _BLOCK):  # one long run between many short ones
        order = np.lexsort((keys, np.repeat(np.arange(len(size_R)), size_R)))
        return keys[order[np.clip(np.cumsum(size_R) - size_R + place_R, 0, len(keys) - 1)]]
    rows = np.full((len(size_R), width), NEVER)
    rows.reshape(-1)[_behind_one_another(size_R, width)] = keys
    rows.sort(axis=1)
    return rows[np.arange(len(rows)), place_R]


def _behind_one_another(size_R: np.ndarray, width: int) -> np.ndarray:
    """Places of the first `size_R` entries of rows of `width` entries, in the flattened rows."""
    gap_R = np.arange(len(size_R)) * width - (np.cumsum(size_R) - size_R)
    places = np.repeat(gap_R, size_R)
    places += np.arange(len(places))
    return places
