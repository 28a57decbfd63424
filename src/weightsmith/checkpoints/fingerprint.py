"""Fingerprints of a checkpoint's content, the same however its tensors are sharded.

Quick    blake2b over config.json (its values, not its spacing) and, per tensor in order of names, name,
         dtype, shape and sampled bytes: tensors up to 16 KiB whole, of others 16 blocks of 1 KiB spread
         evenly from the first byte to the last. A few hundred small reads: 10-30 ms for a model of a
         billion parameters. A change that touches less than a sixteenth of a tensor can slip through.
Full     blake2b over the same facts and a 256-bit checksum of every byte of each tensor. The checksum is a
         position- weighted sum, so tiles may be summed in any order and by any thread; that is what lets
         the writer know the full fingerprint of what it wrote for 0.15 ns a byte, where a cryptographic
         hash costs 0.6-1 ns and the whole merge about 1. It finds accidents (any single change, moved or
         exchanged rows, bytes lost), and is no protection from someone who wants two checkpoints to look
         alike.
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

_ROW = 512  # words of 8 bytes: 4 KiB
_TILE = _ROW * 8 * 32
_MASK = (1 << 64) - 1
_COLUMN_WEIGHTS = 2 * np.arange(_ROW, dtype=np.uint64) + 1

Checksum = tuple[int, int, int, int]
ZERO: Checksum = (0, 0, 0, 0)


def fingerprint(checkpoint: Checkpoint, *, full: bool = False) -> str:
    """The fingerprint of a plain checkpoint: "quick:" or "full:" and 32 hexadecimal digits."""
    if not full:
        return "quick:" + combine(
            checkpoint.config,
            (
                (name, info.dtype, info.shape, _samples(checkpoint, name))
                for name, info in checkpoint.tensors.items()
            ),
        )
    names = list(checkpoint.tensors)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        sums = dict(zip(names, pool.map(lambda name: _checksum(checkpoint, name), names), strict=True))
    shapes = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
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
    return "full:" + combine(config, parts)


def combine(config: Mapping[str, Any], parts: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Hash a config and (name, dtype, shape, bytes) of tensors in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, dtype, shape, data in parts:
        head = json.dumps([name, dtype, list(shape), len(data)]).encode()
        digest.update(head)
        digest.update(data)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def checksum(data: np.ndarray, offset: int) -> Checksum:
    """The checksum of one piece of a tensor; pieces add up (`add`) to the checksum of the whole.

    With the tensor seen as rows of 512 little-endian 8-byte words: the sum of all words weighted by row and
    the sum weighted by column, both of whole words and of their upper halves, modulo 2^64. Weights are odd,
    and the upper halves are there because changes in a word's top bit alone could cancel.

    Args:
        data: Contiguous 1-D uint8 array.
        offset: Offset of its first byte inside the tensor.
    """
    row, lead = divmod(offset, 8 * _ROW)
    if lead or data.size % (8 * _ROW):
        padded = np.zeros(-(-(lead + data.size) // (8 * _ROW)) * 8 * _ROW, np.uint8)
        padded[lead : lead + data.size] = data
        data = padded
    words = data.view("<u8").reshape(-1, _ROW)
    row_weights = 2 * np.arange(row, row + len(words), dtype=np.uint64) + 1
    upper = words >> 32
    return (
        int((words.sum(axis=1) * row_weights).sum()),
        int((words.sum(axis=0) * _COLUMN_WEIGHTS).sum()),
        int((upper.sum(axis=1) * row_weights).sum()),
        int((upper.sum(axis=0) * _COLUMN_WEIGHTS).sum()),
    )


def add(one: Checksum, other: Checksum) -> Checksum:
    """The checksum of two disjoint pieces together."""
    return (
        (one[0] + other[0]) & _MASK,
        (one[1] + other[1]) & _MASK,
        (one[2] + other[2]) & _MASK,
        (one[3] + other[3]) & _MASK,
    )


def _samples(checkpoint: Checkpoint, name: str) -> bytes:
    size = checkpoint.tensors[name].nbytes
    if size <= SAMPLES * SAMPLE_BYTES:
        return checkpoint.read_bytes(name, 0, size).tobytes()
    last = size - SAMPLE_BYTES
    places = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
    return b"".join(checkpoint.read_bytes(name, place, SAMPLE_BYTES).tobytes() for place in places)


def _checksum(checkpoint: Checkpoint, name: str) -> Checksum:
    size = checkpoint.tensors[name].nbytes
    total = ZERO
    buffer = np.empty(min(size, _TILE), np.uint8)
    for start in range(0, size, _TILE):
        piece = checkpoint.read_bytes(name, start, min(_TILE, size - start), buffer)
        total = add(total, checksum(piece, start))
    return total
