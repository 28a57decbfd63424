"""TSV-M: sum the leading singular directions of every fine-tune's change, made mutually orthogonal first.

Problem  Added as they are, the changes of several fine-tunes write into the same directions and disturb
         each other.
Method   Per matrix: D_t = W_t - W_0 = U_t S_t V_t^T, cut to k = floor(q / T) triplets; U = [U_1 .. U_T]
         and V = [V_1 .. V_T] replaced by their nearest column-orthonormal matrices A and B;
         W = W_0 + A diag(S_1 .. S_T) B^T. What is no matrix, and every excluded name: W = W_0 + mean D_t.
Source   Gargiulo et al., arXiv:2412.00081. Where directions of tasks are dependent, a polar factor by SVD is
         arbitrary; here the pseudo-inverse shares them, so that T copies of one task give that task's own
         truncation.
Scale    Matrices behave like a sum (strength 1 is usual), vectors like a mean. `alpha` scales both.
Memory   Whole matrices: the T changes in fp32, about two more of the same size, and a few q x q.
Letters  T tasks, M rows, N columns, q = min(M, N), K columns kept over all tasks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import PerModel
from weightsmith.merging.spectral import Change, MatrixChanges, each_model

if TYPE_CHECKING:
    from torch import Tensor


def tsvm(deltas: Tensor, *, alpha: PerModel = 1.0, rank: float = 1.0) -> Tensor:
    """Merge the changes of T tasks to one matrix.

    Args:
        deltas: fp32 or fp64 (T, M, N). Left untouched.
        alpha: Strength, one number or one for each task.
        rank: Share of min(M, N) that all tasks keep together, in (0, 1].

    Returns:
        (M, N), the change to add to the base.

    Example:
        >>> import torch
        >>> one = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        >>> other = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> tsvm(torch.stack([one, other])).diagonal()
        tensor([3., 2.])
    """
    change = _change(deltas, each_model(alpha, len(deltas)), rank, "tensor")
    return deltas.new_zeros(deltas.shape[1:]) if change.values is None else change.values


@dataclass(frozen=True, kw_only=True)
class Tsvm(MatrixChanges):
    """Options of TSV-M.

    Attributes:
        rank: Share of a matrix's full rank that all models keep together, in (0, 1]; each gets an equal part.
    """

    rank: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 0.0, 1.0, open_low=True)

    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""
        return _change(deltas, each_model(self.alpha, len(deltas)), self.rank, name)


def orthogonal_sum(
    deltas: Tensor, ranks: Sequence[int], scales: Sequence[float]
) -> tuple[Tensor | None, list[int]]:
    """Cut each change to its rank, make all directions orthogonal, add them up with scaled singular values.

    Args:
        deltas: (T, M, N).
        ranks: Triplets to keep of each task, 0 for none; their sum at most min(M, N).
        scales: Factor on each task's singular values.

    Returns:
        (M, N) or None where nothing is left, and the number of triplets each task really had to give.
    """
    import torch

    from weightsmith.tensors.spectra import truncated_svd, whitened_product

    # Equal ranks are one batch, for a GPU's sake.
    batch = truncated_svd(deltas, ranks[0]) if len(set(ranks)) == 1 else None
    parts, used = [], [0] * len(ranks)
    for task, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        if rank == 0:
            continue
        u, s, v = truncated_svd(deltas[task], rank) if batch is None else (side[task] for side in batch)
        used[task] = kept = int((s > 0).sum())  # dropped triplets come last
        parts.append((u[:, :kept], s[:kept] * scale, v[:, :kept]))
    if not any(used):
        return None, used
    u, s, v = (torch.cat(side, dim=-1) for side in zip(*parts, strict=True))
    del batch, parts
    if sum(kept > 0 for kept in used) == 1:
        return (u * s) @ v.mT, used  # one task's directions are orthonormal already
    return whitened_product(u, s, v), used


def few_rows_ranks(deltas: Tensor) -> list[int]:
    """Rank 1 for the q tasks with the largest change, for a matrix with less room than there are tasks."""
    q = min(deltas.shape[-2:])
    norms = [float(delta.double().norm()) for delta in deltas]
    largest = sorted(range(len(norms)), key=lambda task: -norms[task])[:q]
    return [int(task in largest) for task in range(len(norms))]


def _change(deltas: Tensor, alpha: Sequence[float], rank: float, name: str) -> Change:
    tasks, q = len(deltas), min(deltas.shape[-2:])
    ranks = [max(1, int(rank * q / tasks))] * tasks if q >= tasks else few_rows_ranks(deltas)
    values, used = orthogonal_sum(deltas, ranks, alpha)
    return Change(values, used, [1.0] * tasks)
