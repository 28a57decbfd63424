"""Random dropping of task-vector entries, the same whatever the tile, thread or shard an entry is met in.

Entry i of model t in a tensor is kept when byte i of a generator's stream, with bits of a hash of i behind
it, is below the density. The generator (PCG64 DXSM, which can jump to any place of its stream) and the hash
are keyed by seed, tensor name and t. A byte decides all but one entry in 256, and all of them where the
density is a multiple of 1/256; the hash meets any other density to 2**-32. Where chances differ from entry to
entry, two or four bytes of the same stream decide.
"""

from __future__ import annotations

import threading

import numpy as np

from weightsmith.runs.seeds import derive
from weightsmith.tensors.hashing import words_at

_BYTES = 8  # of one step of the generator


class _Streams(threading.local):
    """The generators of a thread and where they are: making one costs as much as a quarter of a tile."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[np.random.PCG64DXSM, int]] = {}

    def at(self, key: int, step: int, steps: int) -> np.random.PCG64DXSM:
        """The generator of `key`, `step` steps from its start; `steps` will be taken."""
        if key not in self._held and len(self._held) >= _HELD:
            self._held.clear()
        generator, reached = self._held.get(key) or (np.random.PCG64DXSM(key), 0)
        if step != reached:
            generator.advance((step - reached) % 2**128)
        self._held[key] = generator, step + steps
        return generator


_HELD = 64  # a tensor has one for each model
_streams = _Streams()


def keys(seed: int, tensor: str, num_models: int) -> tuple[int, ...]:
    """The generator key of each model's mask of one tensor."""
    return tuple(derive(seed, "dropout", tensor, index) for index in range(num_models))


def keep_flags(key: int, start: int, density: float, out: np.ndarray) -> np.ndarray:
    """Which of the entries start, start + 1, ... are kept.

    Args:
        key: From `keys`.
        start: Index of the first entry in its flattened tensor.
        density: Probability of being kept, above 0, at most 1.
        out: bool (n,); set.
    """
    high, low = divmod(round(density * 2**32), 2**24)
    if high == 2**8:
        out[:] = True
        return out
    drawn = _drawn(key, start, out.size, np.uint8)
    if low:
        undecided = np.flatnonzero(np.equal(drawn, np.uint8(high), out=out))
        np.less(drawn, np.uint8(high), out=out)
        out[undecided] = _hash24(key, start + undecided) < low
    else:
        np.less(drawn, np.uint8(high), out=out)
    return out


def keep_flags_each(key: int, start: int, probabilities: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Which entries of whole rows are kept, with a probability for each place in a row.

    Two bytes of the stream decide, so probabilities hold to 2**-16.

    Args:
        key: From `keys`.
        start: Index of the first entry, which begins a row.
        probabilities: fp64 (row,), each above 0 and below 1.
        out: bool (rows, row); set.
    """
    bounds = np.minimum(np.rint(probabilities * 2**16), 2**16 - 1).astype(np.uint16)
    return np.less(_drawn(key, start, out.size, np.uint16).reshape(out.shape), bounds, out=out)


def keep_flags_ranked(
    key: int, start: int, values: np.ndarray, row: int, density: float, epsilon: float, out: np.ndarray
) -> np.ndarray:
    """Which entries of whole rows are kept: the larger in their row, the likelier, and nothing is ranked.

    An entry's rank, as a share of the other entries of its row, is the probability that one of those drawn at
    random is smaller. So `density` - `epsilon` of all are kept by lot, and of the next 2 `epsilon` those that
    are larger than one other; of equals, every second. The probability is density - epsilon + 2 epsilon
    rank / (row - 1), to 2**-32; equals have their mean rank.

    Args:
        key: From `keys`.
        start: Index of the first entry, which begins a row.
        values: fp32 (n,), whole rows; their signs don't count.
        row: Entries of a row, at least 2.
        density: The mean probability.
        epsilon: Half of its range, above 0; density - epsilon and density + epsilon lie inside (0, 1).
        out: bool (n,); set.
    """
    shares = (density - epsilon, 2 * epsilon)
    least, width = (np.uint32(min(round(share * 2**32), 2**32 - 1)) for share in shares)
    drawn = _drawn(key, start, out.size, np.uint32)
    np.less(drawn, least, out=out)
    drawn = drawn - least
    at = np.flatnonzero(drawn < width)
    drawn = drawn[at]
    first = at // row
    first *= row
    other = (drawn / float(width) * (row - 1)).astype(np.int64)
    other += other >= at - first  # not itself
    other += first
    mine, its = np.abs(values[at]), np.abs(values[other])
    out[at] = (mine > its) | ((mine == its) & (drawn & np.uint32(1)).astype(np.bool_))
    return out


def _drawn(key: int, start: int, count: int, kind: type[np.unsignedinteger]) -> np.ndarray:
    """Numbers start .. start + count of the generator's stream, read as integers of `kind`."""
    word = np.dtype(kind).newbyteorder("<")
    each = _BYTES // word.itemsize
    step, skipped = divmod(start, each)
    steps = -(-(skipped + count) // each)
    words = _streams.at(key, step, steps).random_raw(steps)
    return words.astype("<u8", copy=False).view(word)[skipped : skipped + count]


def _hash24(key: int, positions: np.ndarray) -> np.ndarray:
    """Twenty-four bits at each position: int64 (n,) -> uint64 (n,)."""
    return words_at(key, positions) >> np.uint64(40)
