"""Scale gradients in place, each by its own coefficient, and empty those that are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.training.sharded import Slots, spread


def scale_on_host(gradients: Sequence[tuple[Tensor, Slots]], coefficient_S: Tensor, bad_S: Tensor) -> None:
    """On a CPU the coefficients are known now: only clipped gradients are read and written.

    Args:
        gradients: This process's pieces and their slots.
        coefficient_S: Factors, (S,) float32.
        bad_S: Slots whose gradient is not finite, (S,) bool; theirs is filled with zeros, since 0 times NaN
            is NaN.
    """
    factors = coefficient_S.tolist()
    some_bad = bool(bad_S.any())
    clipped, by = [], []
    for gradient, slots in gradients:
        if slots.axis is not None:
            if min(factors[slots.start : slots.start + slots.count]) < 1:
                gradient.mul_(spread(slots, coefficient_S, gradient.ndim))
            if some_bad:
                gradient.masked_fill_(spread(slots, bad_S, gradient.ndim), 0)
        elif some_bad and bool(bad_S[slots.start]):
            gradient.zero_()
        elif factors[slots.start] != 1:
            clipped.append(gradient)
            by.append(factors[slots.start])
    if clipped:
        torch._foreach_mul_(clipped, by)


def scale_on_device(gradients: list[Tensor], factors: list[Tensor], bad: list[Tensor]) -> None:
    """Without a copy to the host: every gradient is read and written. Made for `torch.compile` as much as for
    eager.

    Args:
        gradients: This process's pieces.
        factors: For each a tensor that multiplies it, 0-d or along the stacked axis.
        bad: For each whether it is not finite, shaped like its factor.
    """
    for gradient, factor, empty in zip(gradients, factors, bad, strict=True):
        gradient.copy_(torch.where(empty, 0.0, gradient * factor))
