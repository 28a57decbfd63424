"""How much fine-tunes pull a block in opposite directions, counted on sign bits.

    tau_k   = theta_k - theta_0, all but the largest share of each tensor's magnitudes set to 0
    dis_ab  = entries where tau_a and tau_b have opposite signs
    both_ab = entries where both are not 0
    d       = sum over pairs of dis_ab / sum over pairs of both_ab        over all matrices of a block

Pairs, because "any two of K differ" happens by chance in 1 - 2^(1-K) of the entries and so saturates with K;
over pairs unrelated changes give 0.5, equal ones 0, opposite ones 1, whatever K is.

Source  Mediator, arXiv:2502.04411: a conflict ratio for each layer after denoising. The formula is
        reconstructed.
Cost    K bits twice per entry and K (K-1) / 2 word operations on 64 entries at once; weights are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from weightsmith.merging.mediator.options import MediatorConfig
from weightsmith.merging.parameter import Parameter, Tile
from weightsmith.merging.sums import piece_absolutes, piece_dots, total
from weightsmith.merging.trimming import tensor_cuts, trimmed_deltas

LOW_SUPPORT = 1e-4
"""A conflict measured on a smaller share of the entries than this is noise."""


@dataclass(slots=True)
class Counts:
    """Sums over entries; adding two is measuring both.

    Attributes:
        numel: Entries.
        pairs: Pairs of fine-tunes.
        opposite: Over all pairs, entries of opposite sign.
        shared: Over all pairs, entries that both change.
        any_opposite: Entries where one fine-tune goes up and another down.
        any_shared: Entries that two or more change.
        moved: Sum of all |tau|; only for `signed_mass`.
        left: Sum of |sum_k tau_k|; only for `signed_mass`.
        dots: (K, K) inner products of the changes; only for `cosine`.
    """

    numel: int = 0
    pairs: int = 0
    opposite: int = 0
    shared: int = 0
    any_opposite: int = 0
    any_shared: int = 0
    moved: float = 0.0
    left: float = 0.0
    dots: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def __iadd__(self, other: Counts) -> Counts:
        for part in fields(self):
            if part.name != "pairs":
                setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        self.pairs = max(self.pairs, other.pairs)
        return self

    @property
    def overlap(self) -> float:
        """Share of the entries that an average pair of fine-tunes both change."""
        return self.shared / max(1, self.pairs * self.numel)

    def conflict(self, config: MediatorConfig) -> float:
        """The measure that `config` asks for, in 0 .. 1; 0 where nothing changed."""
        everything = config.denominator == "all"
        if config.conflict == "pairwise_sign":
            return self.opposite / max(1, self.pairs * self.numel if everything else self.shared)
        if config.conflict == "any_sign":
            return self.any_opposite / max(1, self.numel if everything else self.any_shared)
        if config.conflict == "signed_mass":
            return 1 - self.left / self.moved if self.moved > 0 else 0.0
        norms = np.sqrt(np.diagonal(self.dots))
        scale = np.outer(norms, norms)
        cosines = [
            self.dots[a, b] / scale[a, b] for a in range(len(norms)) for b in range(a) if scale[a, b] > 0
        ]
        return float(0.5 * (1 - np.clip(np.mean(cosines), -1, 1))) if cosines else 0.0


def measure(parameter: Parameter, config: MediatorConfig) -> Counts:
    """The counts of one tensor of all fine-tunes.

    Args:
        parameter: With a base and K >= 2 models.
        config: Its measure and denoising.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    models = parameter.num_models
    trims = config.denoise_density < 1
    cuts = tensor_cuts(parameter, [config.denoise_density] * models) if trims else None
    counts = Counts(numel=parameter.numel, pairs=models * (models - 1) // 2)
    moved: list[np.ndarray] = []
    left: list[np.ndarray] = []
    dots: dict[tuple[int, int], list[np.ndarray]] = {}
    for tile in parameter.tiles():
        deltas = trimmed_deltas(tile, cuts)
        _add_signs(counts, *sign_planes(deltas, tile))
        if config.conflict == "cosine":
            for a in range(models):
                for b in range(a + 1):
                    dots.setdefault((a, b), []).append(piece_dots(deltas[a], deltas[b], parameter))
        elif config.conflict == "signed_mass":
            moved += [piece_absolutes(delta, parameter, tile.scratch) for delta in deltas]
            for delta in deltas[1:]:
                deltas[0] += delta
            left.append(piece_absolutes(deltas[0], parameter, tile.scratch))
    if config.conflict == "cosine":
        counts.dots = np.zeros((models, models))
        for (a, b), pieces in dots.items():
            counts.dots[a, b] = counts.dots[b, a] = total(pieces)
    counts.moved, counts.left = total(moved), total(left)
    return counts


def sign_planes(deltas: np.ndarray, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Where changes are positive and where negative: fp32 (K, n) -> twice uint64 (K, words), 64 entries
    each.
    """
    models, numel = deltas.shape
    flags = tile.scratch.get("signs", models * numel, np.bool_).reshape(models, numel)
    planes = []
    for compare in (np.greater, np.less):
        packed = np.packbits(compare(deltas, 0, out=flags), axis=1)
        words = np.zeros((models, -(-packed.shape[1] // 8)), np.uint64)
        words.view(np.uint8)[:, : packed.shape[1]] = packed
        planes.append(words)
    return planes[0], planes[1]


def _add_signs(counts: Counts, up: np.ndarray, down: np.ndarray) -> None:
    moved = up | down
    models = len(up)
    once, twice = moved[0].copy(), np.zeros_like(moved[0])
    for b in range(1, models):
        for a in range(b):
            counts.opposite += ones((up[a] & down[b]) | (down[a] & up[b]))
            counts.shared += ones(moved[a] & moved[b])
        twice |= once & moved[b]
        once |= moved[b]
    counts.any_shared += ones(twice)
    counts.any_opposite += ones(_any(up) & _any(down))


def ones(words: np.ndarray) -> int:
    """Number of bits that are set."""
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def _any(planes: Sequence[np.ndarray] | np.ndarray) -> Any:
    return np.bitwise_or.reduce(planes, axis=0)
