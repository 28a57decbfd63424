"""Passthrough: copy tensors, to stack layer slices of one or several models.

Problem  A deeper model out of the layers of one or two trained ones, or a shallower one; or a plain copy in
         another dtype.
Rule     theta = scale * theta_1
Source   Folklore (layer-stacked models); the page form is mergekit's.
Cost     One pass; bytes are copied as they are where neither scale nor dtype changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile
from weightsmith.tensors.blend import scaled


@dataclass(frozen=True, kw_only=True)
class Passthrough:
    """One model in, the same out.

    Attributes:
        scale: Factor of every element; null copies.
    """

    scale: PerModel | None = None

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_range("scale", self.scale)

    @property
    def copies(self) -> bool:
        """Whether bytes may be copied unread where the dtype stays."""
        return self.scale in (None, (1.0,))

    def survey(self, parameter: Parameter) -> None:
        """Nothing to know beforehand."""

    def merge_tile(self, tile: Tile, stats: None) -> np.ndarray:
        """The scaled tensor, fp32 (n,)."""
        if self.scale is None:
            return tile.models[0]
        assert isinstance(self.scale, tuple)
        return scaled(tile.models[0], self.scale[0])
