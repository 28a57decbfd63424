"""Fingerprints of a checkpoint's content, the same however its tensors are sharded.

Quick    blake2b over config.json (its values, not its spacing) and, per tensor in order of names, name,
         dtype, shape and sampled bytes: tensors up to 16 KiB whole, of others 16 blocks of 1 KiB spread
         evenly from the first byte to the last. Some ten milliseconds for a model of a billion parameters.
         A change that touches less than a sixteenth of a tensor can slip through.
Full     blake2b over the same facts and a 128-bit checksum of all bytes of each tensor. The checksum is a
         weighted sum, so pieces may be summed in any order and by any thread: that is how the writer knows
         the full fingerprint of what it wrote for 0.1 ns a byte, where a cryptographic hash costs 0.6 to 1
         ns and the whole merge about 1. It finds accidents (any single change, moved or exchanged rows,
         lost bytes) and is no protection from someone who wants two checkpoints to look alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from weightsmith.checkpoints.reader import Checkpoint

SAMPLE_BYTES = 1024
SAMPLES = 16

_COLUMNS = 509
"""Words per row of the checksum: a prime, so that rows of real matrices never fall into one column."""

_TILE = 8 * 16384
_MASK = (1 << 64) - 1
_WEIGHTS = 2 * np.arange(_COLUMNS, dtype=np.uint64) + 1

Checksum = tuple[int, int]
ZERO: Checksum = (0, 0)


def fingerprint(checkpoint: Checkpoint, *, full: bool = False) -> str:
    """The fingerprint of a plain checkpoint: "quick:" or "full:" and 32 hexadecimal digits."""
    tensors = checkpoint.tensors
    if not full:
        samples = (
            (name, info.dtype, info.shape, _samples(checkpoint, name)) for name, info in tensors.items()
        )
        return "quick:" + _combine(checkpoint.config, samples)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        sums = dict(zip(tensors, pool.map(lambda name: _checksum(checkpoint, name), tensors), strict=True))
    shapes = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    return full_fingerprint(checkpoint.config, shapes, sums)


def full_fingerprint(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    checksums: Mapping[str, Checksum],
) -> str:
    """The full fingerprint from each tensor's dtype, shape and checksum."""
    parts = (
        (name, *tensors[name], b"".join(word.to_bytes(8, "little") for word in checksums[name]))
        for name in sorted(tensors)
    )
    return "full:" + _combine(config, parts)


def checksum(data: np.ndarray, offset: int) -> Checksum:
    """The checksum of one piece of a tensor; pieces add up (`add`) to the checksum of the whole.

    With the tensor seen as rows of 509 little-endian 8-byte words: the sum of all words, and of their upper
    halves, each weighted by an odd number that belongs to its column, modulo 2^64. The upper halves are
    there because two changes of a word's top bit would cancel.

    Args:
        data: Contiguous 1-D uint8 array.
        offset: Offset of its first byte inside the tensor.
    """
    lead = offset % 8
    if lead or data.size % 8:
        padded = np.zeros((lead + data.size + 7) // 8 * 8, np.uint8)
        padded[lead : lead + data.size] = data
        data = padded
    words = data.view("<u8")
    sums = np.zeros((2, _COLUMNS), np.uint64)
    first = offset // 8 % _COLUMNS
    head = min((_COLUMNS - first) % _COLUMNS, words.size)
    tail = head + (words.size - head) // _COLUMNS * _COLUMNS
    for row, part in zip(sums, (words, words >> 32), strict=True):
        np.add.reduce(part[head:tail].reshape(-1, _COLUMNS), axis=0, out=row)
        row[first : first + head] += part[:head]
        row[: words.size - tail] += part[tail:]
    low, high = sums @ _WEIGHTS
    return int(low), int(high)


def add(one: Checksum, other: Checksum) -> Checksum:
    """The checksum of two disjoint pieces together."""
    return (one[0] + other[0]) & _MASK, (one[1] + other[1]) & _MASK


def _combine(config: Mapping[str, Any], parts: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Hash (name, dtype, shape, bytes) of tensors in order, and a config."""
    digest = hashlib.blake2b(digest_size=16)
    for name, dtype, shape, data in parts:
        digest.update(json.dumps([name, dtype, list(shape), len(data)]).encode())
        digest.update(data)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def _samples(checkpoint: Checkpoint, name: str) -> bytes:
    size = checkpoint.tensors[name].nbytes
    if size <= SAMPLES * SAMPLE_BYTES:
        return checkpoint.read_bytes(name, 0, size).tobytes()
    last = size - SAMPLE_BYTES
    places = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
    return checkpoint.read_pieces(name, places, SAMPLE_BYTES)


def _checksum(checkpoint: Checkpoint, name: str) -> Checksum:
    size = checkpoint.tensors[name].nbytes
    total = ZERO
    buffer = np.empty(min(size, _TILE), np.uint8)
    for start in range(0, size, _TILE):
        piece = checkpoint.read_bytes(name, start, min(_TILE, size - start), buffer)
        total = add(total, checksum(piece, start))
    return total
