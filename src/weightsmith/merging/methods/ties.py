"""TIES: trim each fine-tune to its largest changes, elect a sign per weight, average those that agree.

Problem  Task vectors interfere: small noisy entries dilute each other, large ones of opposite sign cancel.
Rule     1. keep the int(density * n) largest |theta_t - theta_0| of each model, set the rest to 0
         2. gamma = sgn(sum_t w_t tau_t)
         3. tau = sum of the w_t tau_t with sgn(w_t tau_t) = gamma, divided by the w_t of those
         4. theta = theta_0 + lambda * tau
Source   Yadav et al., arXiv:2306.01708 and its public code: the density counts over the whole model, and
         entries that cancel exactly take the sign most entries of the model have. mergekit trims each tensor,
         calls cancelled entries positive and can rescale to the L1 norm from before the trim: `trim_scope`,
         `zero_sign`, `rescale`. Decided here: among equal magnitudes the lower index is kept, so that exactly
         int(density * n) entries are; bfloat16 changes are full of equal ones.
Cost     Tensor scope: two passes, about 9 ns an element for three bfloat16 models on one core. Global scope
         is as fast; `zero_sign: majority` adds a pass (4 ns).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.election import elect, vote_balance
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import ParallelMap, Parameter, PerModel, Tile
from weightsmith.merging.sums import piece_absolutes, total
from weightsmith.merging.trimming import Cuts, collected_bytes, model_cuts, tensor_cuts, trimmed_deltas
from weightsmith.tensors.blend import scaled


@dataclass(frozen=True, slots=True)
class TiesStats:
    """What the first passes found out about one tensor.

    Attributes:
        cuts: Where each model's change is cut off; None keeps everything.
        factors: What each trimmed change is multiplied by, to have its old L1 norm.
        zeros_negative: Cancelled entries elect minus.
    """

    cuts: Cuts | None
    factors: tuple[float, ...] | None
    zeros_negative: bool = False


@dataclass(frozen=True, kw_only=True)
class Ties:
    """Trim, elect, merge.

    Attributes:
        weight: Weight of each model.
        density: Fraction of entries each model's change keeps, in (0, 1].
        lambda_: Scale of the merged change.
        normalize: Divide by the weight of the models that agree.
        trim_scope: Where the density is counted: over the whole model, or in each tensor.
        zero_sign: Sign of entries whose votes cancel.
        rescale: `l1` gives each trimmed change the L1 norm it had.
    """

    weight: PerModel = 1.0
    density: PerModel = 0.2
    lambda_: float = 1.0
    normalize: bool = True
    trim_scope: Literal["global", "tensor"] = "global"
    zero_sign: Literal["majority", "positive"] = "majority"
    rescale: Literal["none", "l1"] = "none"

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_range("weight", self.weight)
        check_range("density", self.density, 0, 1, open_low=True)
        check_range("lambda", self.lambda_)

    @property
    def global_survey(self) -> bool:
        """Whether a statistic spans tensors."""
        return self.zero_sign == "majority" or (self.trim_scope == "global" and self._trims)

    @property
    def _densities(self) -> tuple[float, ...]:
        assert isinstance(self.density, tuple)
        return self.density

    @property
    def _trims(self) -> bool:
        return any(density < 1 for density in self._densities)

    def survey(self, parameter: Parameter) -> TiesStats:
        """Where to trim one tensor."""
        return self._stats(parameter, tensor_cuts(parameter, self._densities) if self._trims else None)

    def survey_all(self, parameters: Sequence[Parameter], parallel: ParallelMap) -> Mapping[str, TiesStats]:
        """Where to trim every tensor, and which sign cancelled entries take."""
        if self._trims and self.trim_scope == "global":
            cuts = model_cuts(parameters, self._densities, parallel)
            found = parallel(lambda parameter: self._stats(parameter, cuts[parameter.name]), parameters)
        else:
            found = parallel(self.survey, parameters)
        if self.zero_sign == "positive":
            return {p.name: stats for p, stats in zip(parameters, found, strict=True)}
        pairs = dict(zip((p.name for p in parameters), found, strict=True))
        balance = sum(parallel(lambda parameter: self._balance(parameter, pairs[parameter.name]), parameters))
        return {name: TiesStats(stats.cuts, stats.factors, balance < 0) for name, stats in pairs.items()}

    def survey_bytes(self, parameters: Sequence[Parameter], threads: int) -> int:
        """Memory that surveys of these tensors take beyond their tiles."""
        if not self._trims:
            return 0
        return collected_bytes(parameters, self._densities, threads, by_tensor=self.trim_scope == "tensor")

    def merge_tile(self, tile: Tile, stats: TiesStats) -> np.ndarray:
        """Base plus the elected change, fp32 (n,)."""
        assert tile.base is not None
        assert isinstance(self.weight, tuple)
        change = elect(
            self._changes(tile, stats),
            self.weight,
            normalize=self.normalize,
            zeros_negative=stats.zeros_negative,
            scratch=tile.scratch,
        )
        scaled(change, self.lambda_)
        return np.add(tile.base, change, out=change)

    def _changes(self, tile: Tile, stats: TiesStats) -> np.ndarray:
        changes = trimmed_deltas(tile, stats.cuts)
        for change, factor in zip(changes, stats.factors or (), strict=False):
            scaled(change, factor)
        return changes

    def _balance(self, parameter: Parameter, stats: TiesStats) -> int:
        assert isinstance(self.weight, tuple)
        weights = self.weight
        return sum(
            vote_balance(self._changes(tile, stats), weights, tile.scratch) for tile in parameter.tiles()
        )

    def _stats(self, parameter: Parameter, cuts: Cuts | None) -> TiesStats:
        if self.rescale == "none" or cuts is None:
            return TiesStats(cuts, None)
        before: list[list[np.ndarray]] = [[] for _ in cuts]
        after: list[list[np.ndarray]] = [[] for _ in cuts]
        for tile in parameter.tiles():
            for index, delta in enumerate(tile.deltas()):
                before[index].append(piece_absolutes(delta, parameter, tile.scratch))
            tile = parameter.tile(tile.start, tile.start + tile.numel)
            for index, delta in enumerate(trimmed_deltas(tile, cuts)):
                after[index].append(piece_absolutes(delta, parameter, tile.scratch))
        return TiesStats(cuts, l1_factors([total(x) for x in before], [total(x) for x in after]))


def l1_factors(before: Sequence[float], after: Sequence[float]) -> tuple[float, ...]:
    """What restores each L1 norm; 1 where there is nothing to restore."""
    return tuple(
        old / new if old >= 1e-7 and new >= 1e-7 else 1.0 for old, new in zip(before, after, strict=True)
    )
