"""Sums over a parameter that do not depend on how it was cut into tiles.

Floating-point addition is not associative, so a sum that followed the tiles would change with their size.
Each row of a matrix, each `GRAIN_ELEMENTS` of a vector, each such piece of a long row is summed by itself
in fp32; the sums of the pieces are then added in fp64 in the order of the elements. Tiles always hold whole
pieces.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from weightsmith.merging.parameter import GRAIN_ELEMENTS, Parameter, Scratch

# Longer dot products start BLAS's own threads, which would fight the engine's workers.
_LONGEST_PIECE = 8192


def piece_dots(x: np.ndarray, y: np.ndarray, parameter: Parameter) -> np.ndarray:
    """Dot products of x and y over the pieces of one tile: fp32 (n,) twice -> fp64 (pieces,)."""
    row = parameter.row if len(parameter.shape) >= 2 else x.size
    if row <= _LONGEST_PIECE and len(parameter.shape) >= 2:
        return np.vecdot(x.reshape(-1, row), y.reshape(-1, row)).astype(np.float64)
    return np.concatenate([_long_dots(x[at : at + row], y[at : at + row]) for at in range(0, x.size, row)])


def piece_absolutes(x: np.ndarray, parameter: Parameter, scratch: Scratch) -> np.ndarray:
    """Sums of |x| over the pieces of one tile: fp32 (n,) -> fp64 (pieces,)."""
    return piece_sums(np.abs(x, out=scratch.get("magnitudes", x.size)), parameter, scratch)


def piece_sums(x: np.ndarray, parameter: Parameter, scratch: Scratch) -> np.ndarray:
    """Sums over the pieces of one tile: fp32 (n,) -> fp64 (pieces,)."""
    return piece_dots(x, scratch.filled(1.0, x.size), parameter)


def piece_sums_each(values: np.ndarray, parameter: Parameter, scratch: Scratch) -> np.ndarray:
    """`piece_sums` of each row: fp32 (T, n) -> fp64 (T, pieces)."""
    row = parameter.row if len(parameter.shape) >= 2 else values.shape[1]
    if row > _LONGEST_PIECE or len(parameter.shape) < 2:
        return np.stack([piece_sums(one, parameter, scratch) for one in values])
    ones = scratch.filled(1.0, values.shape[1]).reshape(-1, row)
    return np.vecdot(values.reshape(len(values), -1, row), ones).astype(np.float64)


def total(pieces: Iterable[np.ndarray]) -> float:
    """The sum of all pieces of all tiles, in order."""
    return float(np.concatenate([np.zeros(1), *pieces]).sum())


def _long_dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    even = x.size - x.size % GRAIN_ELEMENTS
    dots = np.vecdot(x[:even].reshape(-1, GRAIN_ELEMENTS), y[:even].reshape(-1, GRAIN_ELEMENTS))
    rest = [np.vecdot(x[even:], y[even:])] if even < x.size else []
    return np.concatenate([dots, rest]).astype(np.float64)
