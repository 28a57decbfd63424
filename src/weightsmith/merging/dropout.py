"""Random dropping of task-vector entries, the same whatever the tile, thread or shard an entry is met in.

Entry i of model t in a tensor is kept when byte i of a generator's stream, with bits of a hash of i behind
it, is below the density. The generator (PCG64 DXSM, which can jump to any place of its stream) and the hash
are keyed by seed, tensor name and t. A byte decides all but one entry in 256, and all of them where the
density is a multiple of 1/256; the hash meets any other density to 2**-32.
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
    drawn = _drawn_bytes(key, start, out.size)
    if low:
        undecided = np.flatnonzero(np.equal(drawn, np.uint8(high), out=out))
        np.less(drawn, np.uint8(high), out=out)
        out[undecided] = _hash24(key, start + undecided) < low
    else:
        np.less(drawn, np.uint8(high), out=out)
    return out


def keep_flags_each(key: int, start: int, probabilities: np.ndarray, out: np.ndarray) -> np.ndarray:
    """As `keep_flags`, with a probability for each place in a row, the same ones in every row.

    Args:
        key: From `keys`.
        start: Index of the first entry, which begins a row.
        probabilities: fp64 (row,), each above 0 and below 1; they hold to 2**-32.
        out: bool (rows, row); set.
    """
    bounds = np.minimum(np.rint(probabilities * 2**32), 2**32 - 1).astype(np.uint32)
    high = (bounds >> np.uint32(24)).astype(np.uint8)
    drawn = _drawn_bytes(key, start, out.size).reshape(out.shape)
    flat = out.reshape(-1)
    np.equal(drawn, high, out=out)
    undecided = np.flatnonzero(flat)
    np.less(drawn, high, out=out)
    low = bounds & np.uint32(2**24 - 1)
    flat[undecided] = _hash24(key, start + undecided) < low[undecided % len(low)]
    return out


def _drawn_bytes(key: int, start: int, count: int) -> np.ndarray:
    """Bytes start .. start + count of the generator's stream, uint8."""
    step, skipped = divmod(start, _BYTES)
    steps = -(-(skipped + count) // _BYTES)
    words = _streams.at(key, step, steps).random_raw(steps)
    return words.astype("<u8", copy=False).view(np.uint8)[skipped : skipped + count]


def _hash24(key: int, positions: np.ndarray) -> np.ndarray:
    """Twenty-four bits at each position: int64 (n,) -> uint64 (n,)."""
    return words_at(key, positions) >> np.uint64(40)
