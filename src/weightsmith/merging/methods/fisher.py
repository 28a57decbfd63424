"""Fisher: the mean of checkpoints, each weight counted by how much its model's predictions depend on it.

Problem  In a plain mean a weight that one model relies on is moved half way by models to which it is nothing.
Rule     theta = sum_t w_t F_t theta_t / sum_t w_t F_t     F_t diagonal Fisher information of model t
Source   Matena and Raffel, arXiv:2111.09832. F_t comes from a folder made by `weightsmith stats`. Decided
         here: `floor` (the public code's lower bound of F, 1e-6 there) is 0, since F depends on the model's
         size and its loss; where all F are 0 the result is the mean by w.
Cost     One pass over models and statistics, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.parameter import Parameter, PerModel, Statistic, Tile


@dataclass(frozen=True, kw_only=True)
class Fisher:
    """Mean by Fisher information; no base.

    Attributes:
        weight: Weight of each model, from 0 on.
        floor: Least Fisher information that counts, from 0 on.
    """

    weight: PerModel = 1.0
    floor: float = 0.0

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    statistics: ClassVar[Literal["fisher", "gram"]] = "fisher"

    def __post_init__(self) -> None:
        check_range("weight", self.weight, 0)
        check_range("floor", self.floor, 0)
        if isinstance(self.weight, tuple) and sum(self.weight) == 0:
            raise OptionError("weight", f"weights {list(self.weight)} sum to 0")

    def survey(self, parameter: Parameter) -> tuple[Statistic, ...]:
        """Where the Fisher information of each model is."""
        return parameter.statistics

    def merge_tile(self, tile: Tile, stats: tuple[Statistic, ...]) -> np.ndarray:
        """The mean, fp32 (n,)."""
        assert isinstance(self.weight, tuple)
        numel = tile.numel
        read = tile.scratch.get("fisher", numel)
        share, part = (tile.scratch.get(key, numel, np.float64) for key in ("share", "part of sum"))
        above, below, plain = (tile.scratch.get(f"sum {key}", numel, np.float64) for key in range(3))
        for total in (above, below, plain):
            total[:] = 0
        for model, statistic, weight in zip(tile.models, stats, self.weight, strict=True):
            statistic.read(tile.start, tile.start + numel, read)
            np.maximum(read, self.floor, out=share)
            np.multiply(share, weight, out=share)
            np.add(below, share, out=below)
            np.add(above, np.multiply(share, model, out=part), out=above)
            np.add(plain, np.multiply(model, weight, out=part), out=plain)
        np.divide(plain, sum(self.weight), out=plain)
        np.divide(above, below, out=plain, where=below > 0)
        np.copyto(tile.models[0], plain, casting="same_kind")
        return tile.models[0]
