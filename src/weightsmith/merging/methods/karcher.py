"""Karcher mean: the point on the sphere that is nearest to all models along its arcs.

Problem  The straight mean of weight vectors that point different ways is shorter than all of them; SLERP
         keeps the length, but takes two models.
Rule     Per tensor: u_t = theta_t / |theta_t|; m starts at the mean of the u_t, brought to length 1, then
         v = (1/T) sum_t  w_t / sin(w_t) * (u_t - cos(w_t) m),   cos(w_t) = <u_t, m>
         m <- cos(|v|) m + sin(|v|) v / |v|,  until |v| < tol or `max_iter` steps were made
         theta = mean_t |theta_t| * m
Source   Karcher, Comm. Pure Appl. Math. 30, 1977; for merging as mergekit has it (it names arXiv:2603.04972).
         Decided here: m never leaves the span of the models, so the steps are made on their T x T dot
         products, and tensors are read twice whatever `max_iter` is. A tensor shorter than `tol` has no
         direction and counts by its length only.
Cost     Two passes; dot products in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from weightsmith.merging.angles import combined, gram
from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.parameter import Parameter, Tile


@dataclass(frozen=True, kw_only=True)
class Karcher:
    """Mean on the sphere; a base counts as one of the models.

    Attributes:
        max_iter: Most steps that are made.
        tol: Steps, in radians, and lengths below this count as nothing.
    """

    max_iter: int = 10
    tol: float = 1e-5

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    base_is_model: ClassVar[bool] = True
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if self.max_iter < 0:
            raise OptionError("max_iter", f"must be a whole number from 0 on, got {self.max_iter}")
        check_range("tol", self.tol, 0, open_low=True)

    def survey(self, parameter: Parameter) -> tuple[float, ...]:
        """What each model is multiplied by."""
        if parameter.num_models == 1:
            return (1.0,)
        return karcher_coefficients(gram(parameter), max_iter=self.max_iter, tol=self.tol)

    def merge_tile(self, tile: Tile, stats: tuple[float, ...]) -> np.ndarray:
        """The blend, fp32 (n,)."""
        return combined(tile, stats)


def karcher_coefficients(gram_TT: np.ndarray, *, max_iter: int = 10, tol: float = 1e-5) -> tuple[float, ...]:
    """What each of T vectors is multiplied by to give their Karcher mean, at their mean length.

    Args:
        gram_TT: Their dot products, fp64 (T, T).
        max_iter: Most steps.
        tol: Steps and lengths below this count as nothing.

    Example:
        >>> karcher_coefficients(np.diag([1.0, 9.0]))  # a right angle, lengths 1 and 3
        (1.4142135623730951, 0.47140452079103173)
    """
    lengths = np.sqrt(np.maximum(gram_TT.diagonal(), 0.0))
    directed = lengths > tol
    if not directed.any():
        return (0.0,) * len(lengths)
    units = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=directed)
    cosines = gram_TT * np.outer(units, units)
    share = directed / directed.sum()

    def length(coefficients: np.ndarray) -> float:
        return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))

    mean = share.copy()
    if length(mean) < tol:  # they cancel: any start is as good
        mean = np.eye(len(lengths))[int(directed.argmax())]
    mean /= length(mean)
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(dots)
        far = (angles >= tol) & directed
        pull = share * far * angles / np.where(far, np.maximum(np.sin(angles), np.finfo(float).tiny), 1.0)
        step = pull - float(pull @ dots) * mean
        size = length(step)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean /= length(mean)
    return tuple((lengths.mean() * mean * units).tolist())
