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
        stop_B = np.arange(1, len(some) + 1) * length
        chosen[:] = _smallest(keys, np.count_nonzero(some, axis=1), stop_B, ratio)
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
        if exact_count:
            chosen[own] = _smallest(keys, counts[runs], np.cumsum(counts[runs]), ratio)
        else:
            chosen[own] = keys < chance(ratio)
    return chosen


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
    """Where the smallest keys of each run are, that share of those which are not `NEVER`.

    Keys are uniform, so nearly all are told by where the last of the smallest should be; those near it are
    sorted.

    Args:
        keys: int64 (R, T), or (N,) for runs of several lengths.
        count_R: How many of each run's are not `NEVER`.
        stop_R: Where each run ends.
        ratio: Their share.
    """
    size_R = np.diff(stop_R, prepend=0)
    wanted_R = np.array([masked_count(count, ratio) for count in count_R.tolist()])
    low, high = (
        edge_R[:, None] if keys.ndim == 2 else np.repeat(edge_R, size_R)
        for edge_R in _surroundings(wanted_R, count_R)
    )
    chosen = keys < low
    is_near = keys < high
    is_near ^= chosen
    flat_keys, flat_chosen = keys.reshape(-1), chosen.reshape(-1)
    near = np.flatnonzero(is_near)
    near_keys = flat_keys[near]
    near_R = np.diff(np.searchsorted(near, stop_R), prepend=0)
    place_R = wanted_R - 1 - np.add.reduceat(flat_chosen, stop_R - size_R, dtype=np.int64)
    flat_chosen[near] = near_keys <= np.repeat(_sorted_at(place_R, near_keys, near_R), near_R)
    for run in np.flatnonzero((place_R < 0) | (place_R >= near_R)).tolist():
        own = slice(stop_R[run] - size_R[run], stop_R[run])
        flat_chosen[own] = flat_keys[own] <= _kth(flat_keys[own], wanted_R[run])
    return chosen


def _surroundings(wanted_B: np.ndarray, count_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which keys the K-th smallest of uniform ones almost surely is: four deviations either side."""
    share_B = wanted_B / np.maximum(count_B, 1)
    spread_B = 4 * np.sqrt(share_B * (1 - share_B) / np.maximum(count_B, 1))
    low_B, high_B = (
        ((np.clip(edge_B, 0.0, 1.0) * (WORD - 2048)).astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
        for edge_B in (share_B - spread_B, share_B + spread_B)
    )
    return low_B, high_B


def _sorted_at(place_R: np.ndarray, keys: np.ndarray, size_R: np.ndarray) -> np.ndarray:
    """Of the first `size_R[0]` keys the one that is `place_R[0]`-th smallest, from 0; of the next ones the
    next; anything where there is no such place.
    """
    rows = np.full((len(size_R), int(size_R.max(initial=0)) + 1), NEVER)
    rows[np.arange(rows.shape[1]) < size_R[:, None]] = keys
    rows.sort(axis=1)
    return np.take_along_axis(rows, np.clip(place_R, 0, rows.shape[1] - 1)[:, None], axis=1)[:, 0]


def _kth(keys: np.ndarray, wanted: int) -> int:
    """The smallest but `wanted - 1`; for none, a key below all."""
    return int(np.partition(keys, wanted - 1)[wanted - 1]) if wanted else LOWEST
