"""What methods that blend directions share: dot products of whole tensors, blends in the models' span."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement

import numpy as np

from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.merging.sums import piece_dots, total
from weightsmith.tensors.blend import weighted_sum


def gram(parameter: Parameter) -> np.ndarray:
    """Dot products of all pairs of models over one tensor, of their changes where there is a base.

    One pass. Products and sums are fp64: what follows looks at the difference of nearly parallel vectors.

    Returns:
        fp64 (T, T).
    """
    count = parameter.num_models
    pairs = list(combinations_with_replacement(range(count), 2))
    dots: list[list[np.ndarray]] = [[] for _ in pairs]
    for tile in parameter.tiles():
        values = directions(tile)
        exact = tile.scratch.get("exact", values.size, np.float64).reshape(values.shape)
        np.copyto(exact, values)
        for pieces, (s, t) in zip(dots, pairs, strict=True):
            pieces.append(piece_dots(exact[s], exact[t], parameter))
    found = np.zeros((count, count))
    for pieces, (s, t) in zip(dots, pairs, strict=True):
        found[s, t] = found[t, s] = total(pieces)
    return found


def directions(tile: Tile) -> np.ndarray:
    """The models of a tile, or their changes where there is a base; fp32 (T, n), in place."""
    return tile.models if tile.base is None else tile.deltas()


def combined(tile: Tile, coefficients: Sequence[float]) -> np.ndarray:
    """The sum of coefficient times model, or the base plus that of the changes; fp32 (n,)."""
    blend = weighted_sum(directions(tile), coefficients)
    return blend if tile.base is None else np.add(tile.base, blend, out=blend)
