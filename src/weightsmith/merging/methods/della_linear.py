"""DELLA: drop small changes of each fine-tune more often than large ones, rescale the rest, then add.

Problem  DARE drops entries of a change with one probability whatever their size, and so loses large ones.
Rule     Per row of a tensor (a vector is one row) the magnitudes |theta_t - theta_0| are ranked 0 .. n - 1:
         p_i = density - epsilon + 2 epsilon rank_i / (n - 1);   mask_i ~ Bernoulli(p_i)
         tau_i = mask_i (theta_t - theta_0)_i / p_i
         theta = theta_0 + lambda * sum_t w_t tau_t     (`normalize`: divided by sum_t w_t)
Source   Deep et al., arXiv:2406.11617 (MagPrune). mergekit restores each tensor's L1 norm instead of dividing
         by p_i: `rescale: l1`. Density 1 keeps everything, as there. Decided here: a row is the last axis
         (mergekit ranks along the second, which differs in stacks of matrices only); epsilon 0 is DARE, bit
         for bit; equal magnitudes have their mean rank (`l1`), or the higher index ranks higher, those being
         equal that agree in exponent and nine binary digits (`paper`).
Cost     `paper`: one pass, most of it one sort of each row of each model. `l1`: two passes without a sort:
         who is kept takes no ranks, only what their probabilities are does.
Memory   Vectors are masked whole: 4 bytes an element and model while one is in work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from weightsmith.merging.dropout import keep_flags, keep_flags_each, keep_flags_ranked, keys
from weightsmith.merging.methods.dare_linear import Rescale
from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.parameter import Parameter, PerModel, Scratch, Tile
from weightsmith.merging.thinning import AddedChanges


@dataclass(frozen=True, slots=True)
class DellaMasks:
    """Of one tensor: each model's generator key; row length; for a vector what to multiply it by, (T, n)."""

    keys: tuple[int, ...]
    row: int
    vector: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class DellaLinear(AddedChanges):
    """Drop by rank, rescale, then add.

    Attributes:
        density: Mean probability of an entry to be kept, in (0, 1].
        epsilon: Half the difference between the probabilities of a row's largest and its smallest entry;
            density - epsilon and density + epsilon must lie inside (0, 1), unless the density is 1.
        rescale: `paper` divides each entry that is kept by its own probability, `l1` restores each tensor's
            L1 norm.
        seed: Of the masks.
    """

    density: PerModel = 0.5
    epsilon: PerModel = 0.15
    rescale: Rescale = "paper"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density, 0, 1, open_low=True)
        check_range("epsilon", self.epsilon, 0)
        for density, epsilon in _pairs(self.density, self.epsilon):
            if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                room = min(density, 1 - density)
                raise OptionError(
                    "epsilon", f"must be in [0, {room:g}) at density {density:g}, got {epsilon:g}"
                )

    def masks(self, parameter: Parameter) -> DellaMasks:
        """Keys of the masks; a vector, whose tiles are no whole rows, is masked here."""
        known = keys(self.seed, parameter.name, parameter.num_models)
        if len(parameter.shape) >= 2:
            return DellaMasks(known, parameter.row)
        base, models = parameter.whole()
        assert base is not None
        deltas = models.reshape(len(models), -1) - base.reshape(-1)
        vector = np.empty_like(deltas)
        for delta, key, density, epsilon, out in zip(deltas, known, *self._options(), vector, strict=True):
            self._multipliers(delta, parameter.row, key, 0, density, epsilon, out, parameter.scratch)
        return DellaMasks(known, parameter.row, vector)

    def thin(self, deltas: np.ndarray, tile: Tile, masks: DellaMasks) -> np.ndarray:
        """The changes with dropped entries at 0, the others divided by their probability (`paper`)."""
        if masks.vector is not None:
            return np.multiply(deltas, masks.vector[:, tile.start : tile.start + tile.numel], out=deltas)
        work = tile.scratch.get("multipliers", tile.numel)
        for delta, key, density, epsilon in zip(deltas, masks.keys, *self._options(), strict=True):
            self._multipliers(delta, masks.row, key, tile.start, density, epsilon, work, tile.scratch)
            np.multiply(delta, work, out=delta)
        return deltas

    @property
    def restores_norm(self) -> bool:
        """Whether the factors are those that give each thinned change the L1 norm it had before."""
        return self.rescale == "l1" and any(density < 1 for density in self._options()[0])

    def _options(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        assert isinstance(self.density, tuple)
        assert isinstance(self.epsilon, tuple)
        return self.density, self.epsilon

    def _multipliers(
        self,
        delta: np.ndarray,
        row: int,
        key: int,
        start: int,
        density: float,
        epsilon: float,
        out: np.ndarray,
        scratch: Scratch,
    ) -> None:
        """What the entries of whole rows, fp32 (n,), are multiplied by: 0 where they are dropped."""
        if density == 1:
            out[:] = 1
            return
        flags = scratch.get("flags", out.size, np.bool_)
        if epsilon == 0 or row == 1:
            makes_up = np.float32(1 / density if self.rescale == "paper" else 1)
            np.multiply(keep_flags(key, start, density, flags), makes_up, out=out)
        elif self.rescale == "l1":
            np.copyto(out, keep_flags_ranked(key, start, delta, row, density, epsilon, flags))
        else:
            # Drawn in the order of ranks, where probabilities are a ladder, then put where the entries are.
            chances = np.linspace(density - epsilon, density + epsilon, row)
            rows = keep_flags_each(key, start, chances, flags.reshape(-1, row))
            factors = scratch.get("factors", out.size)
            np.multiply(rows, (1 / chances).astype(np.float32), out=factors.reshape(-1, row))
            out[by_rank(delta, row, scratch)] = factors


def by_rank(values: np.ndarray, row: int, scratch: Scratch) -> np.ndarray:
    """Where the entries of each row are by rising magnitude: fp32 (n,), whole rows, to int64 (n,).

    Of equals the first comes first; equal is what agrees in exponent and nine binary digits. Those 16 bits
    are sorted digit by digit, several times faster than all 32 by comparisons.
    """
    halves = scratch.get("halves", values.size, np.uint16)
    np.right_shift(values.view(np.uint32), 15, out=halves, casting="unsafe")  # the sign falls off
    places = np.argsort(halves.reshape(-1, row), axis=1, kind="stable")
    places += np.arange(0, values.size, row)[:, None]
    return places.reshape(-1)


def _pairs(density: PerModel, epsilon: PerModel) -> Iterator[tuple[float, float]]:
    """Each model's density and epsilon; one number stands for all models."""
    densities = density if isinstance(density, tuple) else (density,)
    epsilons = epsilon if isinstance(epsilon, tuple) else (epsilon,)
    count = max(len(densities), len(epsilons))
    for place in range(count):
        yield densities[place % len(densities)], epsilons[place % len(epsilons)]
