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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.matrices import EMBEDDINGS, is_matrix, matrix_indices, smallest_side, stack_shape
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile
from weightsmith.tensors.blend import scaled, summed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LIBRARY_BYTES = 12 << 20  # buffers that BLAS and LAPACK keep for one thread


@dataclass(frozen=True)
class Change:
    """The merged change of one matrix.

    Attributes:
        values: (M, N), or None where no task changed anything.
        ranks: Triplets used of each task.
        weights: Factor on each task's singular values, `alpha` not included.
    """

    values: Tensor | None
    ranks: list[int]
    weights: list[float]


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
class Tsvm:
    """Options of TSV-M.

    Attributes:
        alpha: Strength of the merged change; with one number a model, of each model's change before its SVD.
        rank: Share of a matrix's full rank that all models keep together, in (0, 1]; each gets an equal part.
        exclude: Shell patterns; matching names are averaged, as vectors are. Embeddings and heads by default.
        split_fused: Take fused layers (qkv_proj, query_key_value, c_attn, gate_up_proj) apart before the SVD.
    """

    alpha: PerModel = 1.0
    rank: float = 1.0
    exclude: tuple[str, ...] = EMBEDDINGS
    split_fused: bool = True

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    spectral: ClassVar[bool] = True
    patterns: ClassVar[tuple[str, ...]] = ("exclude",)

    def __post_init__(self) -> None:
        check_range("rank", self.rank, 0.0, 1.0, open_low=True)
        check_range("alpha", self.alpha)

    def takes(self, parameter: Parameter) -> bool:
        """Whether this parameter goes the whole-matrix way; the others are averaged tile by tile."""
        return is_matrix(parameter.name, parameter.shape, self.exclude)

    def room(self, parameter: Parameter) -> int:
        """Directions of the smallest matrix in a parameter that `takes` says yes to.

        Raises:
            InputError: a fused layer whose parts can't be told.
        """
        config: Mapping[str, Any] = parameter.config or {}
        return smallest_side(parameter.name, parameter.shape, config, self.split_fused)

    def survey(self, parameter: Parameter) -> None:
        """No first pass."""

    def merge_tile(self, tile: Tile, stats: Any) -> np.ndarray:
        """The base + mean of alpha_t D_t, fp32 (n,)."""
        assert tile.base is not None
        # Base minus model is +0 where nothing changed, and subtracting +0 keeps even a -0 of the base.
        np.subtract(tile.base, tile.models, out=tile.models)
        strengths = each_model(self.alpha, len(tile.models))
        for model, strength in zip(tile.models, strengths, strict=True):
            scaled(model, strength)
        total = summed(tile.models, tile.models[0])
        total /= np.float32(len(tile.models))
        return np.subtract(tile.base, total, out=total)

    def merge_whole(
        self,
        base: np.ndarray,
        models: np.ndarray,
        parameter: Parameter,
        device: str | torch.device = "cpu",
        stats: Any = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Merge every matrix of one parameter.

        Args:
            base: fp32 of the parameter's shape. Left untouched.
            models: fp32 (T, *shape). Overwritten.
            parameter: Names, shape and the model's config (for fused layers).
            device: Where the linear algebra runs.
            stats: What `survey_all` found for this parameter, for options that need it.

        Returns:
            The merged parameter, and {"matrices", "full_rank", "ranks", "weights"}: how many matrices it
            held; means over them of min(M, N), of the rank used of each model, of each model's weight.
        """
        import torch

        from weightsmith.tensors.spectra import one_thread

        shape = stack_shape(parameter.name, parameter.shape)
        config: Mapping[str, Any] = getattr(parameter, "config", None) or {}
        old, new = base.reshape(shape), models.reshape(len(models), *shape)
        merged = np.empty_like(old)
        changes, full = [], []
        with one_thread():
            for index in matrix_indices(parameter.name, parameter.shape, config, self.split_fused):
                origin = torch.from_numpy(old[index]).to(device)
                deltas = torch.from_numpy(new[:, *index]).to(device)
                deltas -= origin
                change = self.change(deltas, stats, parameter.name)
                merged[index] = (
                    (origin if change.values is None else change.values.add_(origin)).cpu().numpy()
                )
                changes.append(change)
                full.append(min(deltas.shape[1:]))
        info = {
            "matrices": len(changes),
            "full_rank": float(np.mean(full)),
            "ranks": np.mean([change.ranks for change in changes], axis=0).tolist(),
            "weights": np.mean([change.weights for change in changes], axis=0).tolist(),
        }
        return merged.reshape(parameter.shape), info

    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""
        return _change(deltas, each_model(self.alpha, len(deltas)), self.rank, name)

    def whole_bytes(self, shape: Sequence[int], num_models: int) -> int:
        """Peak memory of `merge_whole` on a parameter of this shape, its models included, its base not."""
        rows, columns = sorted(shape[-2:])
        numel = int(np.prod(shape, dtype=np.int64))
        return 4 * ((num_models + 1) * numel + 2 * rows * columns + 7 * rows * rows) + _LIBRARY_BYTES

    def whole_flops(self, shape: Sequence[int], num_models: int) -> float:
        """Rough number of operations of `merge_whole` on a parameter of this shape."""
        rows, columns = sorted(shape[-2:])
        stack = np.prod(shape[:-2], dtype=np.int64)
        return float(stack) * (num_models * (4.0 * columns * rows**2 + 12.0 * rows**3) + 30.0 * rows**3)


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

    from weightsmith.tensors.spectra import truncated_svd, whitening

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
    (left, inner), (right, other) = whitening(u), whitening(v)
    middle = (inner * s) @ other.mT
    if len(left) <= len(right):
        return (left @ middle) @ right.mT, used
    return left @ (middle @ right.mT), used


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


def each_model(value: PerModel, tasks: int) -> tuple[float, ...]:
    """One number for each model."""
    return tuple(value) if isinstance(value, tuple | list) else (float(value),) * tasks
