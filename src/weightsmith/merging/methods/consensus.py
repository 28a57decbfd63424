"""Consensus: task arithmetic with the weights that fewer than `agree` tasks need taken out.

Problem  In a sum of changes most weights serve one task and disturb the others, or serve none.
Rule     tau = sum_t w_t (theta_t - theta_0)
         mask_t = |theta_t - theta_0| > tall_t |tau - (theta_t - theta_0)|     the TALL mask: what t needs
         theta = theta_0 + lambda * tau where at least `agree` masks are set, else theta_0
Source   Wang et al., arXiv:2405.07813, and its public code: tall from 0.2 to 0.6, chosen for each task on
         validation data, where the mask alone should restore that task; two tasks must agree. 0.4 for all
         is decided here. `agree: 0` is task arithmetic.
Cost     One pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """Sum of task vectors where enough tasks need it.

    Attributes:
        weight: Weight of each model's change.
        lambda_: Scale of the whole change.
        tall: Strictness of each model's mask, from 0 on; a larger one sets fewer entries.
        agree: Masks that must be set for a weight to change.
    """

    weight: PerModel = 1.0
    lambda_: float = 1.0
    tall: PerModel = 0.4
    agree: int = 2

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        check_range("weight", self.weight)
        check_range("lambda", self.lambda_)
        check_range("tall", self.tall, 0)
        if self.agree < 0:
            raise OptionError("agree", f"must be a whole number from 0 on, got {self.agree}")

    def survey(self, parameter: Parameter) -> None:
        """Nothing to know beforehand."""

    def merge_tile(self, tile: Tile, stats: None) -> np.ndarray:
        """Base plus what is agreed on of the change, fp32 (n,)."""
        assert tile.base is not None
        assert isinstance(self.weight, tuple)
        assert isinstance(self.tall, tuple)
        deltas = tile.deltas()
        change, part = tile.scratch.get("change", tile.numel), tile.scratch.get("part", tile.numel)
        change[:] = 0
        for delta, weight in zip(deltas, self.weight, strict=True):
            np.add(change, np.multiply(delta, np.float32(weight), out=part), out=change)
        flag = tile.scratch.get("flags", tile.numel, np.bool_)
        count = tile.scratch.get("count", tile.numel, np.uint16)
        count[:] = 0
        for delta, tall in zip(deltas, self.tall, strict=True):
            np.abs(np.subtract(change, delta, out=part), out=part)
            np.multiply(part, np.float32(tall), out=part)
            np.add(count, np.greater(np.abs(delta, out=delta), part, out=flag), out=count)
        np.multiply(change, np.greater_equal(count, self.agree, out=flag), out=change)
        np.multiply(change, np.float32(self.lambda_), out=change)
        return np.add(tile.base, change, out=change)
