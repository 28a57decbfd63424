"""Random dropping of task-vector entries, the same whatever the tile, thread or shard an entry is met in.

Entry i of model t in a tensor is kept when lane i of a counter-based generator (Philox) is below density *
2**32. The generator's key is made of seed, tensor name and t; its counter of i. Sixteen bits decide all but
one entry in 65,536; those take sixteen more from a hash of key and i, so that any density is met to 2**-32.
"""

from __future__ import annotations

import numpy as np

from weightsmith.runs.seeds import derive

# 16-bit lanes that one step of Philox's counter makes: 4 words of 64 bits.
_LANES = 16


def keys(seed: int, tensor: str, num_models: int) -> tuple[int, ...]:
    """The generator key of each model's mask of one tensor."""
    return tuple(derive(seed, "dropout", tensor, index) for index in range(num_models))


def keep_flags(key: int, start: int, density: float, out: np.ndarray) -> np.ndarray:
    """Which of the entries start, start + 1, ... are kept.

    Args:
        key: From `keys`.
        start: Index of the first entry in its flattened tensor.
        density: Probability of being kept, above 0, below 1.
        out: bool (n,); set.
    """
    step, skipped = divmod(start, _LANES)
    words = np.random.Philox(key=key, counter=step).random_raw(-(-(skipped + out.size) // 4))
    lanes = words.astype("<u8", copy=False).view("<u2")[skipped : skipped + out.size]
    high, low = divmod(round(density * 2**32), 2**16)
    if high == 2**16:
        out[:] = True
        return out
    if low:
        np.equal(lanes, np.uint16(high), out=out)
        undecided = np.flatnonzero(out)
        np.less(lanes, np.uint16(high), out=out)
        out[undecided] = _hash16(key, start + undecided) < low
    else:
        np.less(lanes, np.uint16(high), out=out)
    return out


def _hash16(key: int, positions: np.ndarray) -> np.ndarray:
    """Sixteen bits of a SplitMix64 step at each position: int64 (n,) -> uint64 (n,)."""
    state = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state >> np.uint64(48)
