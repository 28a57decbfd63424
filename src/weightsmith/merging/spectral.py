"""What methods share that merge the changes of whole matrices: TSV-M, RESM, Iso-C, Iso-CTS, WUDI.

Matrices are merged one by one (`change`); what is no matrix, and every excluded name, is
W_0 + mean_t alpha_t D_t, tile by tile.

Letters  T tasks, M rows, N columns
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.matrices import (
    EMBEDDINGS,
    inputs_first,
    is_matrix,
    matrix_indices,
    smallest_side,
    stack_shape,
)
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


@dataclass(frozen=True, kw_only=True)
class MatrixChanges(abc.ABC):
    """Merge the changes of each matrix whole, average the rest.

    Attributes:
        alpha: Strength of the merged change; with one number a model, of each model's change beforehand.
        exclude: Shell patterns; matching names are averaged, as vectors are. Embeddings and heads by default.
        split_fused: Take fused layers (qkv_proj, query_key_value, c_attn, gate_up_proj) apart beforehand.
    """

    alpha: PerModel = 1.0
    exclude: tuple[str, ...] = EMBEDDINGS
    split_fused: bool = True

    base: ClassVar[Literal["required", "optional", "none"]] = "required"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    spectral: ClassVar[bool] = True
    by_inputs: ClassVar[bool] = False
    """Whether `change` needs to know which side of a matrix is the inputs: it then sees (outputs, inputs)."""
    patterns: ClassVar[tuple[str, ...]] = ("exclude",)

    def __post_init__(self) -> None:
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

    def survey(self, parameter: Parameter) -> Any:
        """No first pass."""
        return None

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
        turned = self.by_inputs and inputs_first(parameter.name, shape, config)
        changes, full = [], []
        with one_thread():
            for index in matrix_indices(parameter.name, parameter.shape, config, self.split_fused):
                origin = torch.from_numpy(old[index]).to(device)
                deltas = torch.from_numpy(new[:, *index]).to(device)
                deltas -= origin
                change = self.change(deltas.mT if turned else deltas, stats, parameter.name)
                if turned and change.values is not None:
                    change = replace(change, values=change.values.mT)
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

    @abc.abstractmethod
    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""

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


def each_model(value: PerModel, tasks: int) -> tuple[float, ...]:
    """One number for each model."""
    return tuple(value) if isinstance(value, tuple | list) else (float(value),) * tasks
