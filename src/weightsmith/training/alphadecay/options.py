"""Settings of AlphaDecay, and the rule that turns exponents into factors of the base weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from weightsmith.errors import InputError

Assign = Literal["linear", "sqrt", "log2", "sigmoid_gradnorm"]
DEGENERATE = 1e-6
"""Range of exponents, relative to the largest, below which they count as equal."""
SIGMOID_SLOPE = 4.0  # `sigmoid_alpha` of the public code


@dataclass(frozen=True, kw_only=True)
class AlphaDecayOptions:
    """How weight decay is shared out between matrices.

    Attributes:
        scale_range: Factors of the base decay for the heaviest and the lightest tail (paper: 0.67 and 3, or
            0.67 and 5 where the base decay is weak).
        interval: Optimiser steps from one look at the spectra to the next.
        base_weight_decay: The decay that the factors multiply; each matrix's own parameter group decides when
            it is left out.
        include: Regular expressions; when given, only parameters whose name one of them finds take part.
        exclude: Regular expressions; parameters whose name one of them finds do not take part.
        min_dim: Smallest side below which a matrix has too few eigenvalues to take part.
        assign: How exponents become decays: linear (the paper's), sqrt, log2, or sigmoid_gradnorm (from the
            norms of the gradients instead of exponents).
        normalize: none keeps the paper's factors, whose mean is about 1.8; mean rescales them so that the
            mean over weights is 1 and the total decay equals that of uniform decay.
        hill_convention: Where the tail's threshold lies, as in the public code or as in the paper; they
            differ by a few hundredths.
        tail_fraction: Share of the spectrum that is its tail.
        metric: alpha_hill, or alpha_hill_farms, the mean over square blocks, which does not favour long
            matrices.
        compat: author takes every linear layer but the first and the last, as the public code does.
        decay_rest: What does not take part keeps its group's decay (group), or gets the base decay, norms,
            biases and embeddings included (base), as the public code does.
        split: Name patterns of fused projections -> (axis, number of equal pieces or their sizes); the decay
            is the mean over the pieces.
        mode: decoupled steers the decay inside each step of an AdamW-like optimiser and leaves its groups
            alone; groups gives each matrix a parameter group (any optimiser, before a learning rate scheduler
            is built); auto takes decoupled where the optimiser decouples decay.
        on_nonfinite: A matrix with NaN or infinity stops the run (raise) or keeps its last decay (keep).
    """

    scale_range: tuple[float, float] = (0.67, 3.0)
    interval: int = 500
    base_weight_decay: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_dim: int = 50
    assign: Assign = "linear"
    normalize: Literal["none", "mean"] = "none"
    hill_convention: Literal["code", "paper"] = "code"
    tail_fraction: float = 0.5
    metric: Literal["alpha_hill", "alpha_hill_farms"] = "alpha_hill"
    compat: Literal["none", "author"] = "none"
    decay_rest: Literal["group", "base"] = "group"
    split: Mapping[str, tuple[int, int | tuple[int, ...]]] = field(default_factory=dict)
    mode: Literal["auto", "decoupled", "groups"] = "auto"
    on_nonfinite: Literal["raise", "keep"] = "raise"

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
            raise InputError(f"scale_range must be 0 <= s1 <= s2 and finite, got ({low}, {high})")
        if self.interval < 1:
            raise InputError(f"interval must be at least 1 step, got {self.interval}")
        if self.base_weight_decay is not None and not 0 <= self.base_weight_decay < math.inf:
            raise InputError(f"base_weight_decay must not be negative, got {self.base_weight_decay}")
        if self.min_dim < 2:
            raise InputError(f"min_dim must be at least 2, got {self.min_dim}")
        if not 0 < self.tail_fraction < 1:
            raise InputError(f"tail_fraction must be above 0 and below 1, got {self.tail_fraction}")


def decay_factors(
    scores: np.ndarray,
    options: AlphaDecayOptions,
    *,
    numel: Sequence[int],
    layers: Sequence[int | None] | None = None,
) -> np.ndarray:
    """What each matrix's base decay is multiplied by.

    Args:
        scores: fp64 (L,): the exponents, or gradient norms for `sigmoid_gradnorm`. Those that are not finite
            set no bound and get the factor 1.
        options: `assign`, `scale_range` and `normalize` count.
        numel: Weights of each matrix, for `normalize`.
        layers: Layer of each matrix: `sigmoid_gradnorm` compares within a layer.

    Returns:
        fp64 (L,).
    """
    factors = np.ones(len(scores))
    known = np.isfinite(scores)
    if not known.any():
        return factors
    values = scores[known]
    if options.assign == "linear":
        factors[known] = _linear(values, *options.scale_range)
    elif options.assign == "sigmoid_gradnorm":
        groups = np.array([-1 if layer is None else layer for layer in layers or [None] * len(scores)])
        factors[known] = _sigmoid(values, groups[known])
    else:
        raw = np.sqrt(values) if options.assign == "sqrt" else np.log2(values)
        factors[known] = raw / raw.mean()
    if options.normalize == "mean":
        factors *= np.sum(numel) / np.dot(numel, factors)
    return factors


def _linear(values: np.ndarray, low: float, high: float) -> np.ndarray:
    smallest, largest = values.min(), values.max()
    if largest - smallest < DEGENERATE * max(1.0, abs(largest)):
        return np.ones_like(values)
    return (values - smallest) / (largest - smallest) * (high - low) + low


def _sigmoid(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    factors = np.ones_like(values)
    for group in np.unique(groups):
        mine = groups == group
        score = (values[mine] - values[mine].mean()) / (values[mine].std() + 1e-8)
        factors[mine] = 2 / (1 + np.exp(-SIGMOID_SLOPE * score))
    return factors
