"""What methods share that thin each fine-tune's change out before they merge it: DARE, DELLA, Breadcrumbs.

    tau_t = thinned (theta_t - theta_0) times a factor of the tensor
    added     theta = theta_0 + lambda * sum_t w_t tau_t             (`normalize`: divided by sum_t w_t)
    elected   gamma = sgn(sum_t w_t tau_t)
              theta = theta_0 + lambda * (sum of the w_t tau_t with sign gamma) / (sum of their w_t)

A method says what its masks are (`masks`), sets what they drop to 0 (`thin`), and may have factors that make
up for it (`factors`). Where those take a pass of their own, what it kept is remembered for the next: a bit
an entry costs less than to find it out again.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.election import elect, vote_balance
from weightsmith.merging.methods.task_arithmetic import weight_sum
from weightsmith.merging.methods.ties import l1_factors
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import ParallelMap, Parameter, PerModel, Tile
from weightsmith.merging.sums import piece_sums_each, total
from weightsmith.tensors.blend import scaled, weighted_sum

_KEPT_BYTES = 1 << 24
"""What may be remembered of one tensor; the tiles past that are thinned again."""
Kept = dict[int, np.ndarray]
"""Start of a tile -> which of its entries, (T, n) flattened, are kept: packed bits."""


@dataclass(frozen=True, slots=True)
class Thinning:
    """What the first passes found out about one tensor.

    Attributes:
        masks: The method's own.
        factors: What each model's thinned change is multiplied by.
        zeros_negative: Cancelled entries elect minus.
        kept: What is left in the tiles that a pass before this one remembered; each is forgotten once taken.
    """

    masks: Any
    factors: tuple[float, ...]
    zeros_negative: bool = False
    kept: Kept = field(default_factory=dict)


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

    @property
    @abc.abstractmethod
    def restores_norm(self) -> bool:
        """Whether the factors are those that give each thinned change the L1 norm it had before."""

    def constant_factors(self, num_models: int) -> tuple[float, ...]:
        """What each model's thinned change is multiplied by where the norm is not restored."""
        return (1.0,) * num_models

    def survey(self, parameter: Parameter) -> Thinning:
        """Masks and factors of one tensor, which is merged next."""
        return self._survey(parameter, _KEPT_BYTES)

    def survey_bytes(self, parameters: Sequence[Parameter], threads: int) -> int:
        """Memory that surveys of these tensors take beyond their tiles."""
        if not self.restores_norm:
            return 0
        bits = sorted((p.numel * p.num_models // 8 for p in parameters), reverse=True)
        return sum(min(size, _KEPT_BYTES) for size in bits[:threads])

    def merge_tile(self, tile: Tile, stats: Thinning) -> np.ndarray:
        """Base plus the sum of thinned changes, fp32 (n,)."""
        assert tile.base is not None
        assert isinstance(self.weight, tuple)
        scale = self.lambda_ / weight_sum(self.weight, self.normalize)
        weights = [weight * factor * scale for weight, factor in zip(self.weight, stats.factors, strict=True)]
        change = weighted_sum(self._thinned(tile, stats), weights)
        return np.add(tile.base, change, out=change)

    def _survey(self, parameter: Parameter, room: int) -> Thinning:
        masks = self.masks(parameter)
        if self.restores_norm:
            factors, kept = self._restored(parameter, masks, room)
            return Thinning(masks, factors, kept=kept)
        return Thinning(masks, self.constant_factors(parameter.num_models))

    def _restored(self, parameter: Parameter, masks: Any, room: int) -> tuple[tuple[float, ...], Kept]:
        """The factors that give each thinned change the L1 norm it had before, and what is left of the tiles
        that fit into `room` bytes; one pass.
        """
        before: list[np.ndarray] = []
        after: list[np.ndarray] = []
        kept: Kept = {}
        for tile in parameter.tiles():
            sizes = tile.deltas()
            np.abs(sizes, out=sizes)  # what is dropped does not depend on the sign
            before.append(piece_sums_each(sizes, parameter, tile.scratch))
            sizes = self.thin(sizes, tile, masks)
            after.append(piece_sums_each(sizes, parameter, tile.scratch))
            if sizes.size // 8 < room:
                flags = tile.scratch.get("flags", sizes.size, np.bool_)
                np.greater(sizes.reshape(-1), np.float32(0), out=flags)
                kept[tile.start] = np.packbits(flags)
                room -= kept[tile.start].nbytes
        models = range(parameter.num_models)
        sums = ([total(tile[one] for tile in tiles) for one in models] for tiles in (before, after))
        return l1_factors(*sums), kept

    def _thinned(self, tile: Tile, stats: Thinning) -> np.ndarray:
        """`thin`, or what it is known to keep."""
        deltas = tile.deltas()
        kept = stats.kept.pop(tile.start, None)
        if kept is None:
            return self.thin(deltas, tile, stats.masks)
        flags = np.unpackbits(kept, count=deltas.size).view(np.bool_).reshape(deltas.shape)
        return np.multiply(deltas, flags, out=deltas)


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
        surveys = parallel(lambda parameter: self._survey(parameter, room=0), parameters)
        found = {p.name: s for p, s in zip(parameters, surveys, strict=True)}

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
        changes = self._thinned(tile, stats)
        if _common_factor(stats) == 1.0:
            for change, factor in zip(changes, stats.factors, strict=True):
                scaled(change, factor)
        return changes


def _common_factor(stats: Thinning) -> float:
    """A factor all models share waits until they are one change; it moves no vote."""
    return stats.factors[0] if len(set(stats.factors)) == 1 else 1.0
