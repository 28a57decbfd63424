"""Iso-C: the sum of the fine-tunes' changes with all its singular values set to their mean.

Problem  A sum of changes has a few directions that all tasks share and that drown what one task alone needs.
Method   Per matrix: sum_t D_t = U S V^T;  W = W_0 + mean(S) * U V^T.
         What is no matrix, and every excluded name: W = W_0 + mean D_t.
         U V^T is the polar factor, which a Gram matrix gives without an SVD, and <U V^T, sum> = sum(S).
Source   Marczak et al., arXiv:2502.04959. Decided here: directions with s <= 1e-5 s_max are rounding and stay
         out, where U V^T of an SVD would fill them with arbitrary ones; they count as 0 in the mean.
Scale    Matrices behave like a sum, vectors like a mean. `alpha` scales both; the paper tunes it, near 1.
Memory   Whole matrices: the T changes in fp32, about three more of the same size, and a few q x q.
Letters  T tasks, M rows, N columns, q = min(M, N)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.merging.spectral import Change, MatrixChanges, each_model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class IsoC(MatrixChanges):
    """Options of Iso-C."""

    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""
        total = weighted_total(deltas, each_model(self.alpha, len(deltas)))
        values, rank = isotropic(total)
        return Change(values, [rank] * len(deltas), [1.0] * len(deltas))


def weighted_total(deltas: Tensor, alpha: tuple[float, ...]) -> Tensor:
    """The sum of alpha_t D_t in the memory of the first: (T, M, N) -> (M, N); all are overwritten."""
    for delta, strength in zip(deltas, alpha, strict=True):
        delta.mul_(strength)
    for delta in deltas[1:]:
        deltas[0].add_(delta)
    return deltas[0]


def isotropic(matrix: Tensor) -> tuple[Tensor | None, int]:
    """The matrix with all its singular values set to their mean, and its rank; None where it is zero.

    Args:
        matrix: fp32 or fp64 (M, N).

    Example:
        >>> import torch
        >>> isotropic(torch.diag(torch.tensor([3.0, 1.0])))[0].diagonal()
        tensor([2., 2.])
    """
    from weightsmith.tensors.spectra import whiten

    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    nearest = whiten(wide.mT).mT
    rank = round(float(nearest.square().sum()))  # each singular value is 1
    if rank == 0:
        return None, 0
    nearest *= (nearest * wide).sum() / len(wide)
    return nearest if wide is matrix else nearest.mT, rank
