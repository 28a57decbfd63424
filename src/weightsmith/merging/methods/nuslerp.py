"""NuSLERP: two models (or their changes) blended along the arc, by weights, over tensors, rows or columns.

Problem  SLERP turns a whole tensor at once and knows no base.
Rule     x = theta_1, y = theta_2, or their changes with a base;   t = w_2 / (w_1 + w_2)
         cos(omega) = <x, y> / (|x| |y|)   of the tensor, or of each line of it (`nuslerp_flatten: false`)
         theta = (theta_0 +) sin((1 - t) omega) / sin(omega) * x + sin(t omega) / sin(omega) * y
         a straight blend where sin(omega) is 0, or one of the two is all zeros
Source   Goddard, mergekit's `nuslerp`, whose parameters these are. Decided here: an all-zero line blends
         straight (mergekit takes it for a right angle, which leaves y longer than its share); weights that
         cancel are t = 1/2, as there; `nuslerp_row_wise` turns columns of each matrix of a stack.
Cost     Two passes, about as SLERP; columns are added up row by row in fp64, which takes twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.angles import directions
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile
from weightsmith.merging.sums import piece_dots


@dataclass(frozen=True, slots=True)
class ArcStats:
    """What the two ends are multiplied by, and how that lies over the tensor.

    Attributes:
        factors: fp32 (2, lines), or (2, matrices, columns) for columns.
        line: Elements of a line; the tensor's own number for one angle.
        rows: Rows of a matrix where lines are columns, else 0.
    """

    factors: np.ndarray
    line: int
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class NuSlerp:
    """Blend of exactly two models along the arc.

    Attributes:
        weight: Weight of each model; their ratio is the place on the arc.
        nuslerp_flatten: One angle for the whole tensor; else one for each line of a matrix.
        nuslerp_row_wise: Lines are columns (what meets one input) instead of rows (what makes one output).
    """

    weight: PerModel = 1.0
    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False

    base: ClassVar[Literal["required", "optional", "none"]] = "optional"
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        check_range("weight", self.weight)

    def survey(self, parameter: Parameter) -> ArcStats:
        """The angles and what follows from them."""
        assert isinstance(self.weight, tuple)
        total = sum(self.weight)
        t = self.weight[1] / total if abs(total) >= 1e-6 else 0.5
        if self.nuslerp_flatten or len(parameter.shape) < 2:
            dots = _line_dots(parameter).sum(axis=1, keepdims=True)
            return ArcStats(arc_factors(t, dots), max(parameter.numel, 1))
        if self.nuslerp_row_wise:
            return ArcStats(arc_factors(t, _column_dots(parameter)), parameter.row, parameter.shape[-2])
        dots = _line_dots(parameter).reshape(3, max(parameter.numel // parameter.row, 0), -1).sum(axis=2)
        return ArcStats(arc_factors(t, dots), parameter.row)

    def merge_tile(self, tile: Tile, stats: ArcStats) -> np.ndarray:
        """The blend, fp32 (n,)."""
        both = directions(tile)
        factors = stats.factors
        if stats.rows:
            lines = np.arange(tile.start // stats.line, (tile.start + tile.numel) // stats.line)
            factors = factors[:, lines // stats.rows if factors.shape[1] > 1 else slice(None)]
        elif factors.shape[1] > 1:
            first = tile.start // stats.line
            factors = factors[:, first : first + tile.numel // stats.line, None]
        else:
            factors = factors[:, :, None]
        shaped = both.reshape(2, -1, stats.line if factors.shape[1] > 1 or stats.rows else tile.numel)
        np.multiply(shaped, factors, out=shaped)
        blend = np.add(both[0], both[1], out=both[0])
        return blend if tile.base is None else np.add(tile.base, blend, out=blend)


def arc_factors(t: float, dots: np.ndarray) -> np.ndarray:
    """What the two ends of each arc are multiplied by.

    Args:
        t: Place on the arc, 0 at the first end.
        dots: <x, x>, <y, y>, <x, y> of each pair: fp64 (3, ...).

    Returns:
        fp32 (2, ...).
    """
    lengths = np.sqrt(dots[0] * dots[1])
    cosines = np.divide(dots[2], lengths, out=np.ones_like(lengths), where=lengths > 0)
    straight = 1.0 - np.square(np.clip(cosines, -1.0, 1.0)) <= 1e-16
    angles = np.arccos(np.where(straight, 0.0, cosines))
    ends = [np.where(straight, share, np.sin(share * angles) / np.sin(angles)) for share in (1.0 - t, t)]
    return np.array(ends, np.float32)


def _line_dots(parameter: Parameter) -> np.ndarray:
    """The three dot products over the pieces of a tensor, fp64 (3, pieces)."""
    found: list[list[np.ndarray]] = []
    for tile in parameter.tiles():
        x, y = directions(tile)
        found.append([piece_dots(a, b, parameter) for a, b in ((x, x), (y, y), (x, y))])
    return np.concatenate([np.zeros((3, 0)), *map(np.array, found)], axis=1)


def _column_dots(parameter: Parameter) -> np.ndarray:
    """The three dot products over the columns of each matrix, fp64 (3, matrices, columns).

    Row after row is added, so that the sums do not depend on where tiles begin.
    """
    rows, columns = parameter.shape[-2:]
    sums = np.zeros((3, parameter.numel // max(rows * columns, 1), columns))
    for tile in parameter.tiles():
        exact = directions(tile).reshape(2, -1, columns).astype(np.float64)
        first = tile.start // columns
        for place in range(exact.shape[1]):
            x, y = exact[:, place]
            here = sums[:, (first + place) // rows]
            here[0] += x * x
            here[1] += y * y
            here[2] += x * y
    return sums
