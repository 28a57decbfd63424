"""Iso-CTS: common directions of the fine-tunes' changes and each task's best outside of them, all equal.

Problem  Iso-C makes the directions of the sum equally strong; what one task needs and the sum does not hold
         is lost among them.
Method   Per matrix, of q = min(M, N) directions:
         common  sum_t D_t = U S V^T, cut to k triplets
         tasks   of each D_t less its part in U: the (q - k) / T leading triplets
         all left vectors, and all right ones, replaced by their nearest orthonormal ones A, B (as TSV-M):
         W = W_0 + mean(all q singular values) * A B^T
         with k = q - T round((q - int(common q)) / T), so that tasks share equally.
Source   Marczak et al., arXiv:2502.04959, and its public code (common 0.8). Decided here: dependent
         directions get the pseudo-inverse, and what is rounding (s <= 1e-6 s_max) stays out and counts as 0
         in the mean; tasks take no more than there is where `common` is small.
Memory   As Iso-C.
Letters  T tasks, M rows, N columns
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.merging.methods.iso_c import weighted_total
from weightsmith.merging.options import check_range
from weightsmith.merging.spectral import Change, MatrixChanges, each_model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class IsoCts(MatrixChanges):
    """Options of Iso-CTS.

    Attributes:
        common: Share of a matrix's directions that come from the sum, in [0, 1], about.
    """

    common: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("common", self.common, 0, 1)

    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""
        import torch

        from weightsmith.tensors.spectra import truncated_svd, whitened_product

        tasks, q = len(deltas), min(deltas.shape[-2:])
        common, own = shares(q, tasks, self.common)
        alpha = each_model(self.alpha, tasks)
        total = weighted_total(deltas.clone(), alpha)
        parts, used = [], [0] * tasks
        shared = 0
        if common:
            u, s, v = truncated_svd(total, common)
            shared = int((s > 0).sum())
            parts.append((u[:, :shared], s[:shared], v[:, :shared]))
        for task in range(tasks if own else 0):
            rest = deltas[task].mul_(alpha[task])
            if shared:
                left = parts[0][0]
                rest -= left @ (left.mT @ rest)
            u, s, v = truncated_svd(rest, own)
            # What the common directions left over of a task that lies in them is rounding too.
            used[task] = kept = int((s > 1e-6 * total.norm() / q**0.5).sum())
            parts.append((u[:, :kept], s[:kept], v[:, :kept]))
        u, s, v = (torch.cat(side, dim=-1) for side in zip(*parts, strict=True))
        if not s.numel():
            return Change(None, [0] * tasks, [1.0] * tasks)
        values = whitened_product(u, (s.sum() / q).expand_as(s), v)
        return Change(values, [shared + number for number in used], [1.0] * tasks)


def shares(q: int, tasks: int, common: float) -> tuple[int, int]:
    """Common directions, and those of each task, of q in all.

    Example:
        >>> shares(10, 2, 0.8), shares(10, 3, 0.8), shares(2, 3, 0.0)
        ((8, 1), (7, 1), (2, 0))
    """
    own = min(round((q - int(q * common)) / tasks), q // tasks)
    return q - tasks * own, own
