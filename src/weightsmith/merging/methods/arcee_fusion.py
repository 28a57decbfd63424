"""Arcee Fusion: take those weights of the other model whose change matters most to their row.

Problem  Of a second model only the changes that matter, without a density to choose.
Rule     Per tensor: score_i = |theta_1 - theta_0|_i * KL(softmax(row of theta_1) || softmax(row of theta_0))
         threshold = median + 1.5 (third - first quartile) of the scores
         theta = theta_1 where score >= threshold, else theta_0
Source   Arcee AI, as mergekit has it. A quartile is the sorted score at int(q (n - 1)). mergekit estimates
         quartiles from a million random entries of larger tensors and adds 1e-8 to each probability; here
         quartiles are exact, and the divergence is summed in a form that does not cancel, so that 1e-8
         is not needed.
Decided  A vector is one row.
Cost     Three passes; two exponentials an element in the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.merging.trimming import sample_of_tensor
from weightsmith.tensors.selection import Selection

_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class FusionStats:
    """Of one tensor: each row's divergence, fp32 (rows,); row length; the least score that is taken."""

    divergences: np.ndarray
    row: int
    threshold: np.float32


@dataclass(frozen=True, kw_only=True)
class ArceeFusion:
    """Weights of exactly one model, taken over by importance; it has no options."""

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = 1

    def survey(self, parameter: Parameter) -> FusionStats:
        """Divergences of the rows and the threshold of the scores."""
        stats = FusionStats(_divergences(parameter), parameter.row, np.float32(0))
        if parameter.numel == 0:
            return stats
        first, median, third = _quartiles(parameter, stats)
        threshold = np.float32(median + np.float32(1.5) * (third - first))
        return FusionStats(stats.divergences, stats.row, threshold)

    def merge_tile(self, tile: Tile, stats: FusionStats) -> np.ndarray:
        """The base with the other model's weights where they are taken, fp32 (n,)."""
        assert tile.base is not None
        taken = tile.scratch.get("taken", tile.numel, np.bool_)
        np.greater_equal(_scores(tile, stats), stats.threshold, out=taken)
        (change,) = tile.models  # differences by now
        np.multiply(change, taken, out=change)
        return np.add(tile.base, change, out=change)


def _scores(tile: Tile, stats: FusionStats) -> np.ndarray:
    """The importance of each entry, fp32 (n,) in a scratch buffer; the tile's model turns into its change."""
    deltas = tile.deltas()
    scores = np.abs(deltas[0], out=tile.scratch.get("scores", tile.numel))
    if stats.divergences.size == 1:
        return np.multiply(scores, stats.divergences[0], out=scores)
    first = tile.start // stats.row
    rows = scores.reshape(-1, stats.row)
    np.multiply(rows, stats.divergences[first : first + len(rows), None], out=rows)
    return scores


def _quartiles(parameter: Parameter, stats: FusionStats) -> list[np.float32]:
    """The scores at a quarter, a half and three quarters of the order, exactly."""
    numel = parameter.numel
    # Whole rows: a score needs its row's divergence.
    rows = max(1, sample_of_tensor(parameter) // parameter.row) if len(parameter.shape) >= 2 else 1
    total_rows = numel // parameter.row
    picked = np.linspace(0, total_rows - 1, min(rows, total_rows)).astype(np.int64).tolist()
    pieces = [
        _scores(parameter.tile(at * parameter.row, (at + 1) * parameter.row), stats).copy() for at in picked
    ]
    if len(pieces) == total_rows:
        order = np.sort(np.concatenate(pieces))
        return [order[int(share * (numel - 1))] for share in _SHARES]
    bits = np.concatenate(pieces).view(np.int32)
    selections = [Selection(numel - int(share * (numel - 1)), numel, bits) for share in _SHARES]
    while any(selection.cuts is None for selection in selections):
        scans = [selection.scan(numel) for selection in selections]
        for tile in parameter.tiles():
            flags = tile.scratch.get("flags", 2 * tile.numel, np.bool_).reshape(2, -1)
            scores = _scores(tile, stats).view(np.int32)
            for selection, scan in zip(selections, scans, strict=True):
                if selection.cuts is None:
                    scan.add(tile.start, scores, flags)
        for selection, scan in zip(selections, scans, strict=True):
            if selection.cuts is None:
                selection.finish([scan])
    return [np.int32(selection.cuts[0].bits).view(np.float32) for selection in selections if selection.cuts]


def _divergences(parameter: Parameter) -> np.ndarray:
    """KL(softmax(model) || softmax(base)) of each row, fp32 (rows,)."""
    if len(parameter.shape) < 2:
        base, models = parameter.whole()
        assert base is not None
        return row_divergences(models.reshape(1, -1), base.reshape(1, -1))
    found = [np.zeros(0, np.float32)]
    for tile in parameter.tiles():
        assert tile.base is not None
        shaped = (tile.models[0].reshape(-1, parameter.row), tile.base.reshape(-1, parameter.row))
        found.append(row_divergences(*shaped))
    return np.concatenate(found)


def row_divergences(model: np.ndarray, base: np.ndarray) -> np.ndarray:
    """KL(p || q) of the rows' softmaxes p of `model` and q of `base`.

    With d = model - base less its mean under q:  KL = sum q e^d d / sum q e^d - log(sum q e^d), where sums
    near 0 are written with e^d - 1, so that nothing large cancels.

    Args:
        model: fp32 (rows, n). Overwritten.
        base: fp32 (rows, n). Overwritten.

    Returns:
        fp32 (rows,), not negative.
    """
    if base.size == 0:
        return np.zeros(len(base), np.float32)
    difference = np.subtract(model, base, out=model)
    np.subtract(base, base.max(axis=1, keepdims=True), out=base)
    q = np.exp(base, out=base)
    mass = _row_sums(q)
    center = _row_sums(q * difference) / mass
    np.subtract(difference, center.astype(np.float32)[:, None], out=difference)
    grown = np.expm1(difference)
    np.multiply(q, grown, out=grown)  # q (e^d - 1)
    rest = _row_sums(grown) / mass
    slope = (_row_sums(grown * difference) + _row_sums(np.multiply(q, difference, out=q))) / mass
    return np.maximum(slope / (1.0 + rest) - np.log1p(rest), 0.0).astype(np.float32)


def _row_sums(values: np.ndarray) -> np.ndarray:
    return values.sum(axis=1, dtype=np.float64)
