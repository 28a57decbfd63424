"""A model's weights under a mask that changes a little from step to step.

The dense weights stay as they are, in memory of their own; what the model computes with is a copy, and of it
only the groups whose mask changed are written again. Beside the weights this holds one more copy of those
that are pruned, and one integer for each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from weightsmith.compression.nm.groups import grouped, mask_from, to_groups
from weightsmith.compression.nm.targets import Target
from weightsmith.tensors.zeros import masked


class MaskedWeights:
    """A context in which the model's targets are masked; after it they are the dense weights again.

    Args:
        targets: The parameters.
        codes: The mask to begin with, for each by name.
        m: Size of a group.
    """

    def __init__(self, targets: Sequence[Target], codes: Mapping[str, Tensor], m: int) -> None:
        self._targets, self._m = {target.name: target for target in targets}, m
        self._codes = {target.name: codes[target.name].clone() for target in targets}
        self._dense: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        for name, target in self._targets.items():
            self._dense[name] = target.parameter.data
            mask = mask_of(self._codes[name], target, self._m)
            target.parameter.data = masked(target.parameter.data, mask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, dense in self._dense.items():
            self._targets[name].parameter.data = dense
        self._dense.clear()

    def dense(self, name: str) -> Tensor:
        """The dense weight of a target."""
        return self._dense[name]

    def show(self, name: str, codes: Tensor) -> None:
        """Put a target under another mask."""
        changed = (codes != self._codes[name]).nonzero().flatten()
        if len(changed):
            target = self._targets[name]
            view = grouped(target.parameter.data, self._m, target.dim)
            dense = grouped(self._dense[name], self._m, target.dim)
            places = torch.unravel_index(changed, view.shape[:-1])
            view[places] = masked(dense[places], to_groups(codes[changed], self._m))
        self._codes[name].copy_(codes)


def mask_of(codes: Tensor, target: Target, m: int) -> Tensor:
    """The mask of a parameter: (G,) -> bool of its shape."""
    return mask_from(codes, m, target.shape, target.dim)
