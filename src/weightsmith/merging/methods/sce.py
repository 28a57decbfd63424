"""SCE: select weights on which fine-tunes differ, weigh models by energy, erase the minority's signs.

Problem  Most weights changed alike or not at all; where models differ, those that changed a tensor most
         should decide, and opposite signs should not cancel.
Rule     Per tensor, with d_t = theta_t - theta_0:
         1. select  of the n' entries whose variance over t is not 0, keep the int(select_topk * n') largest
         2. weigh   w_t = sum of d_t^2 / sum over all models
         3. erase   gamma = sgn(sum_t d_t); entries of other sign leave
         theta = theta_0 + (sum of the w_t d_t with sign gamma) / (sum of their w_t)
Source   Wan et al., arXiv:2408.07990 (FuseChat), as mergekit has it. mergekit gives all models the same
         weight where the mean squares of a tensor's changes sum to less than 1e-6, which those of most
         fine-tunes do: `weight_floor`, 0 here. Cancelled entries are positive. Decided here: among equal
         variances the lower index is kept; what is left is divided by the weight present, however small
         (mergekit: at least 1e-6).
Cost     Four passes, two with `select_topk: 1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.election import elect
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.merging.sums import piece_dots, total
from weightsmith.merging.trimming import sample_of_tensor
from weightsmith.tensors.selection import Cut, Selection, keep_mask


@dataclass(frozen=True, slots=True)
class SceStats:
    """Of one tensor: which variances are kept (None: all entries), and each model's weight."""

    cut: Cut | None
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sce:
    """Select, weigh, erase.

    Attributes:
        select_topk: Fraction of the entries whose changes differ that is kept, in [0, 1].
        weight_floor: Models of a tensor weigh the same where the mean squares of their changes sum to less.
    """

    select_topk: float = 1.0
    weight_floor: float = 0.0

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_range("select_topk", self.select_topk, 0, 1)
        check_range("weight_floor", self.weight_floor, 0)

    def survey(self, parameter: Parameter) -> SceStats:
        """Where variances are cut, and the models' weights."""
        cut = self._cut(parameter) if self.select_topk < 1 else None
        squares: list[list[np.ndarray]] = [[] for _ in parameter.models]
        for tile in parameter.tiles():
            for pieces, delta in zip(squares, _selected(tile, cut), strict=True):
                pieces.append(piece_dots(delta, delta, parameter))
        energy = np.array([total(pieces) for pieces in squares])
        whole = float(energy.sum())
        if whole == 0 or whole / parameter.numel < self.weight_floor:
            return SceStats(cut, (1.0 / len(energy),) * len(energy))
        return SceStats(cut, tuple((energy / whole).tolist()))

    def merge_tile(self, tile: Tile, stats: SceStats) -> np.ndarray:
        """Base plus the merged change, fp32 (n,)."""
        assert tile.base is not None
        change = elect(
            _selected(tile, stats.cut),
            stats.weights,
            normalize=True,
            zeros_negative=False,
            scratch=tile.scratch,
            weigh_votes=False,
        )
        return np.add(tile.base, change, out=change)

    def _cut(self, parameter: Parameter) -> Cut:
        differ = 0
        for tile in parameter.tiles():
            differ += int(np.count_nonzero(_variances(tile.deltas(), tile)))
        sample = parameter.sample(sample_of_tensor(parameter))
        bits = _variances(sample.deltas(), sample).view(np.int32)
        selection = Selection(int(self.select_topk * differ), parameter.numel, bits.copy())
        while selection.cuts is None:
            scan = selection.scan(parameter.numel)
            for tile in parameter.tiles():
                flags = tile.scratch.get("flags", 2 * tile.numel, np.bool_).reshape(2, -1)
                scan.add(tile.start, _variances(tile.deltas(), tile).view(np.int32), flags)
            selection.finish([scan])
        return selection.cuts[0]


def _selected(tile: Tile, cut: Cut | None) -> np.ndarray:
    """The changes with entries that were not selected at 0, in place."""
    deltas = tile.deltas()
    if cut is not None:
        bits = _variances(deltas, tile).view(np.int32)
        words = deltas.view(np.int32)
        np.bitwise_and(words, keep_mask(bits[None], [cut], tile.start, bits[None]), out=words)
    return deltas


def _variances(deltas: np.ndarray, tile: Tile) -> np.ndarray:
    """The variance over the models at each entry, fp32 (n,) in a scratch buffer; 0 where all are equal."""
    numel = deltas.shape[1]
    mean, part = tile.scratch.get("mean", numel), tile.scratch.get("part", numel)
    variance = tile.scratch.get("variance", numel)
    mean[:] = 0
    # From the first model on: equal changes then have a mean, and so a variance, of exactly 0.
    for delta in deltas[1:]:
        np.add(mean, np.subtract(delta, deltas[0], out=part), out=mean)
    np.divide(mean, np.float32(len(deltas)), out=mean)
    np.square(mean, out=variance)
    for delta in deltas[1:]:
        np.subtract(delta, deltas[0], out=part)
        np.subtract(part, mean, out=part)
        np.add(variance, np.square(part, out=part), out=variance)
    return np.divide(variance, np.float32(len(deltas)), out=variance)
