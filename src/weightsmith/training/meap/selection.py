"""The choice of `masking` in NumPy, which has in-place arithmetic and a faster selection than torch on a CPU:
of rows of one length, and of runs of any lengths that lie behind one another.

Letters  B rows, T places of a row, R runs, N places of all runs
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
_BLOCK = 1 << 17  # keys at a time
_GOLDEN = np.uint64(GOLDEN)


def masked_count(eligible: int, ratio: float) -> int:
    """K for a number of eligible tokens; exact where a product such as 0.1 x 30 falls short of 3."""
    if eligible == 0 or ratio == 0:
        return 0
    return max(1, math.floor(ratio * eligible + 1e-9))


def chance(ratio: float) -> int:
    """What a key is below with probability `ratio`."""
    return math.floor(ratio * WORD) + LOWEST


def choose_in_rows(allowed: np.ndarray, ratio: float, seed: int, per_row: bool) -> np.ndarray:
    """Bool (B, T): exactly that share of each row's allowed places, for a ratio between 0 and 1.

    Some rows at a time, in the same memory, which stays in the cache.
    """
    rows, length = allowed.shape
    row_B = np.broadcast_to(_row_keys(rows if per_row else 1, seed), rows)
    place_T = np.arange(length, dtype=np.uint64) * _GOLDEN
    mask = np.empty(allowed.shape, bool)
    block = max(1, _BLOCK // length)
    memory, scratch = np.empty((2, min(block, rows), length), np.uint64)
    for first in range(0, rows, block):
        some, chosen = allowed[first : first + block], mask[first : first + block]
        unsigned = memory[: len(some)]
        np.add(row_B[first : first + block, None], place_T, out=unsigned)
        _mix(unsigned, scratch[: len(some)])
        keys = unsigned.view(np.int64)
        np.putmask(keys, ~some, NEVER)
        threshold_B = _thresholds(keys, np.count_nonzero(some, axis=1), ratio)
        np.less_equal(keys, threshold_B[:, None], out=chosen)
        chosen &= some
    return mask


def choose_in_runs(
    places: np.ndarray, counts: np.ndarray, ratio: float, seed: int, *, exact_count: bool = True
) -> np.ndarray:
    """Bool (N,): a random part of each run's places.

    Args:
        places: int64 (N,), those of a run behind those of the run before it: what tells them apart in it.
        counts: int64 (R,), how many places each run has, at least one.
        ratio: Share of them, at least one where `ratio` is not 0.
        seed: Decides which.
        exact_count: Exactly that share; otherwise that probability.
    """
    if ratio in (0, 1):
        return np.full(len(places), ratio == 1)
    key_R, chosen = _row_keys(len(counts), seed), np.empty(len(places), bool)
    for runs, own in _blocks(np.cumsum(counts)):
        unsigned = places[own].view(np.uint64) * _GOLDEN
        unsigned += np.repeat(key_R[runs], counts[runs])
        _mix(unsigned, np.empty_like(unsigned))
        keys = unsigned.view(np.int64)
        chosen[own] = _smallest_of_runs(keys, counts[runs], ratio) if exact_count else keys < chance(ratio)
    return chosen


def _blocks(stop_R: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Runs whose places fit the cache, and these places."""
    first = begin = 0
    while first < len(stop_R):
        last = max(first + 1, int(np.searchsorted(stop_R, begin + _BLOCK, side="right")))
        stop = int(stop_R[last - 1])
        yield slice(first, last), slice(begin, stop)
        first, begin = last, stop


def _smallest_of_runs(keys: np.ndarray, count_R: np.ndarray, ratio: float) -> np.ndarray:
    wanted_R = np.array([masked_count(count, ratio) for count in count_R.tolist()])
    low_R, high_R = _surroundings(wanted_R, count_R)
    stop_R = np.cumsum(count_R)
    begin_R = stop_R - count_R
    chosen = keys < np.repeat(low_R, count_R)
    near = np.flatnonzero((keys < np.repeat(high_R, count_R)) & ~chosen)
    near_keys, size_R = keys[near], np.diff(np.searchsorted(near, stop_R), prepend=0)
    place_R = wanted_R - 1 - np.add.reduceat(chosen, begin_R, dtype=np.int64)
    threshold_R, missed = _smallest(near_keys, size_R, place_R)
    chosen[near] = near_keys <= np.repeat(threshold_R, size_R)
    for run in missed:
        own = slice(begin_R[run], stop_R[run])
        chosen[own] = keys[own] <= _kth(keys[own], wanted_R[run])
    return chosen


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


def _thresholds(keys: np.ndarray, count_B: np.ndarray, ratio: float) -> np.ndarray:
    """The K-th smallest of each row's `count_B` uniform keys; keys (B, T)."""
    wanted_B = np.array([masked_count(count, ratio) for count in count_B.tolist()])
    low_B, high_B = _surroundings(wanted_B, count_B)
    is_near = keys >= low_B[:, None]
    place_B = wanted_B - (keys.shape[1] - np.count_nonzero(is_near, axis=1)) - 1
    is_near &= keys < high_B[:, None]
    found_B, missed = _smallest(keys[is_near], np.count_nonzero(is_near, axis=1), place_B)
    for row in missed:
        found_B[row] = _kth(keys[row], wanted_B[row])
    return found_B


def _surroundings(wanted_B: np.ndarray, count_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which keys the K-th smallest of uniform ones almost surely is: six deviations either side."""
    share_B = wanted_B / np.maximum(count_B, 1)
    spread_B = 6 * np.sqrt(share_B * (1 - share_B) / np.maximum(count_B, 1))
    low_B, high_B = (
        ((np.clip(edge_B, 0.0, 1.0) * (WORD - 2048)).astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
        for edge_B in (share_B - spread_B, share_B + spread_B)
    )
    return low_B, high_B


def _smallest(near: np.ndarray, size_B: np.ndarray, place_B: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Of the first `size_B[0]` keys the one that is `place_B[0]`-th smallest, from 0; of the next ones the
    next; and the rows where that place is outside.
    """
    rows = np.full((len(size_B), int(size_B.max(initial=0)) + 1), NEVER)
    rows[np.arange(rows.shape[1]) < size_B[:, None]] = near
    rows.sort(axis=1)
    found_B = np.take_along_axis(rows, np.clip(place_B, 0, rows.shape[1] - 1)[:, None], axis=1)[:, 0]
    return found_B, np.flatnonzero((place_B < 0) | (place_B >= size_B)).tolist()


def _kth(keys: np.ndarray, wanted: int) -> int:
    """The smallest but `wanted - 1`; for none, a key below all."""
    return int(np.partition(keys, wanted - 1)[wanted - 1]) if wanted else LOWEST
