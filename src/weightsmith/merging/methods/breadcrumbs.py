"""Breadcrumbs: drop the largest and the smallest changes of each fine-tune, then task arithmetic.

Problem  Task vectors hold outliers, which wreck a sum of many, and a mass of small noise, which dilutes it.
Rule     Per tensor and model, of the n entries by magnitude: drop the int(gamma * n) largest, of the rest
         keep the int(density * n) largest (outliers make room where both do not fit)
         theta = theta_0 + lambda * sum_t w_t tau_t     (`normalize`: divided by sum_t w_t)
Source   Davari and Belilovsky, arXiv:2312.06795. There the small ones are dropped up to a percentile beta;
         here, as in mergekit, the density says what is left, so that beta = 1 - density - gamma. Decided
         here: among equal magnitudes the lower index is the larger; int(density * n) entries are left
         whatever gamma is, in small tensors too.
Cost     Two passes, as TIES; about a third more time, for two thresholds a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile
from weightsmith.merging.thinning import AddedChanges
from weightsmith.merging.trimming import Cuts, band_cuts, collected_bytes, trimmed

Masks = tuple[Cuts, Cuts] | None
"""Cuts that keep a model's largest entries, and those that single out its outliers; None keeps all."""


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(AddedChanges):
    """Drop both ends, then add.

    Attributes:
        density: Fraction of entries of each tensor's change that is left, in (0, 1].
        gamma: Fraction of entries dropped as outliers, in [0, 1).
        rescale: `l1` gives each thinned change the L1 norm it had.
    """

    density: PerModel = 0.15
    gamma: PerModel = 0.01
    rescale: Literal["none", "l1"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("density", self.density, 0, 1, open_low=True)
        check_range("gamma", self.gamma, 0, 1, open_high=True)

    def masks(self, parameter: Parameter) -> Masks:
        """Where each model's change of this tensor is cut, above and below."""
        densities, gammas = self._options()
        if all(density == 1 for density in densities):
            return None
        numel = parameter.numel
        bands = []
        for density, gamma in zip(densities, gammas, strict=True):
            left = int(density * numel)
            outliers = min(int(gamma * numel), numel - left)
            bands.append((left + outliers, outliers))
        return band_cuts(parameter, bands)

    def thin(self, deltas: np.ndarray, tile: Tile, masks: Masks) -> np.ndarray:
        """The changes with both ends at 0."""
        return deltas if masks is None else trimmed(deltas, tile, *masks)

    @property
    def restores_norm(self) -> bool:
        """Whether the factors are those that give each thinned change the L1 norm it had before."""
        return self.rescale == "l1" and any(density < 1 for density in self._options()[0])

    def survey_bytes(self, parameters: Sequence[Parameter], threads: int) -> int:
        """Memory that surveys of these tensors take beyond their tiles."""
        densities, gammas = self._options()
        if all(density == 1 for density in densities):
            return 0
        ends = (tuple(map(sum, zip(densities, gammas, strict=True))), gammas)
        cuts = sum(
            collected_bytes(parameters, [min(end, 1.0) for end in each], threads, by_tensor=True)
            for each in ends
        )
        return cuts + super().survey_bytes(parameters, threads)

    def _options(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        assert isinstance(self.density, tuple)
        assert isinstance(self.gamma, tuple)
        return self.density, self.gamma
