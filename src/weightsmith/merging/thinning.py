"""What methods share that thin each fine-tune's change out before they merge it: DARE, DELLA, Breadcrumbs.

    tau_t = thinned (theta_t - theta_0) times a factor of the tensor
    added     theta = theta_0 + lambda * sum_t w_t tau_t             (`normalize`: divided by sum_t w_t)
    elected   gamma = sgn(sum_t w_t tau_t)
              theta = theta_0 + lambda * (sum of the w_t tau_t with sign gamma) / (sum of their w_t)

A method says what its masks are (`masks`), sets what they drop to 0 (`thin`), and may have factors that make
up for it (`factors`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.election import elect, vote_balance
from weightsmith.merging.methods.task_arithmetic import weight_sum
from weightsmith.merging.methods.ties import l1_factors
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import ParallelMap, Parameter, PerModel, Tile
from weightsmith.merging.sums import piece_sums, total
from weightsmith.tensors.blend import scaled, weighted_sum


@dataclass(frozen=True, slots=True)
class Thinning:
    """What the first passes found out about one tensor.

    Attributes:
        masks: The method's own.
        factors: What each model's thinned change is multiplied by.
        zeros_negative: Cancelled entries elect minus.
    """

    masks: Any
    factors: tuple[float, ...]
    zeros_negative: bool = False


@dataclass(frozen=True, kw_only=True)
class AddedChanges(abc.ABC):
    """Thin, then add.

    Attributes:
        weight: Weight of each model's change.
        lambda_: Scale of the whole change.
        normalize: Divide by the sum of weights.
    """

    weight: PerModel = 1.0
    lambda_: float = 1.0
    normalize: bool = False

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_range("weight", self.weight)
        check_range("lambda", self.lambda_)

    @abc.abstractmethod
    def masks(self, parameter: Parameter) -> Any:
        """What `thin` needs to know of one tensor."""

    @abc.abstractmethod
    def thin(self, deltas: np.ndarray, tile: Tile, masks: Any) -> np.ndarray:
        """The changes of one tile, fp32 (T, n), with dropped entries at 0; in place."""

    def factors(self, parameter: Parameter, masks: Any) -> tuple[float, ...]:
        """What each model's thinned change is multiplied by."""
        return (1.0,) * parameter.num_models

    def survey(self, parameter: Parameter) -> Thinning:
        """Masks and factors of one tensor."""
        masks = self.masks(parameter)
        return Thinning(masks, self.factors(parameter, masks))

    def merge_tile(self, tile: Tile, stats: Thinning) -> np.ndarray:
        """Base plus the sum of thinned changes, fp32 (n,)."""
        assert tile.base is not None
        assert isinstance(self.weight, tuple)
        scale = self.lambda_ / weight_sum(self.weight, self.normalize)
        weights = [weight * factor * scale for weight, factor in zip(self.weight, stats.factors, strict=True)]
        change = weighted_sum(self.thin(tile.deltas(), tile, stats.masks), weights)
        return np.add(tile.base, change, out=change)

    def restored(self, parameter: Parameter, masks: Any) -> tuple[float, ...]:
        """The factors that give each thinned change the L1 norm it had before, in one pass."""
        before: list[list[np.ndarray]] = [[] for _ in parameter.models]
        after: list[list[np.ndarray]] = [[] for _ in parameter.models]
        for tile in parameter.tiles():
            sizes = tile.deltas()
            np.abs(sizes, out=sizes)  # what is dropped does not depend on the sign
            for pieces, size in zip(before, sizes, strict=True):
                pieces.append(piece_sums(size, parameter, tile.scratch))
            for pieces, size in zip(after, self.thin(sizes, tile, masks), strict=True):
                pieces.append(piece_sums(size, parameter, tile.scratch))
        return l1_factors([total(pieces) for pieces in before], [total(pieces) for pieces in after])


@dataclass(frozen=True, kw_only=True)
class ElectedChanges(AddedChanges):
    """Thin, elect a sign per weight, merge those that agree.

    Attributes:
        weight: Weight of each model.
        lambda_: Scale of the merged change.
        normalize: Divide by the weight of the models that agree.
        zero_sign: Sign of entries whose votes cancel.
    """

    normalize: bool = True
    zero_sign: Literal["majority", "positive"] = "majority"

    @property
    def global_survey(self) -> bool:
        """Whether a statistic spans tensors."""
        return self.zero_sign == "majority"

    def survey_all(self, parameters: Sequence[Parameter], parallel: ParallelMap) -> Mapping[str, Thinning]:
        """Masks and factors of every tensor, and the sign cancelled entries take."""
        assert isinstance(self.weight, tuple)
        weights = self.weight
        found = {p.name: s for p, s in zip(parameters, parallel(self.survey, parameters), strict=True)}

        def balance(parameter: Parameter) -> int:
            mine, tiles = found[parameter.name], parameter.tiles()
            return sum(vote_balance(self._changes(tile, mine), weights, tile.scratch) for tile in tiles)

        negative = sum(parallel(balance, parameters)) < 0
        return {name: dataclasses.replace(stats, zeros_negative=negative) for name, stats in found.items()}

    def merge_tile(self, tile: Tile, stats: Thinning) -> np.ndarray:
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
        scaled(change, self.lambda_ * _common_factor(stats))
        return np.add(tile.base, change, out=change)

    def _changes(self, tile: Tile, stats: Thinning) -> np.ndarray:
        changes = self.thin(tile.deltas(), tile, stats.masks)
        if _common_factor(stats) == 1.0:
            for change, factor in zip(changes, stats.factors, strict=True):
                scaled(change, factor)
        return changes


def _common_factor(stats: Thinning) -> float:
    """A factor all models share waits until they are one change; it moves no vote."""
    return stats.factors[0] if len(set(stats.factors)) == 1 else 1.0
