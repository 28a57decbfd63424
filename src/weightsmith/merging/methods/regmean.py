"""RegMean: the linear layers whose outputs are nearest to those of every fine-tune on its own inputs.

Problem  A mean of weights is not a mean of what they do: inputs that one task never has should not count
         against it.
Method   Per linear layer W (outputs, inputs), with G_t the mean of x x^T over the inputs x of model t:
         W minimises sum_t w_t E_t |W x - W_t x|^2:   W = (sum_t w_t W_t G_t) (sum_t w_t G_t)^-1
         off-diagonal entries of G_t times 0.9 first. What was not measured (norms, embeddings): mean by w.
Source   Jin et al., arXiv:2212.09849. G_t comes from a folder made by `weightsmith stats`. Decided here: it
         is a mean over tokens, so that the amount of data doesn't weigh; the equation is solved for the
         difference from the mean of the W_t, so that inputs nobody has keep that mean.
Memory   Whole matrices: the T models, about two more, and four of (inputs, inputs) in fp64.
Letters  T tasks, M outputs, N inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.matrices import inputs_first
from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.parameter import Parameter, PerModel, Tile
from weightsmith.tensors.blend import weighted_sum

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DROP = 1e-10


@dataclass(frozen=True, kw_only=True)
class RegMean:
    """Regression on the inputs of each model; no base.

    Attributes:
        weight: Weight of each model, from 0 on.
        off_diagonal: Factor of the off-diagonal entries of each Gram matrix, in [0, 1].
    """

    weight: PerModel = 1.0
    off_diagonal: float = 0.9

    base: ClassVar[Literal["required", "optional", "none"]] = "none"
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    spectral: ClassVar[bool] = True
    statistics: ClassVar[Literal["fisher", "gram"]] = "gram"

    def __post_init__(self) -> None:
        check_range("weight", self.weight, 0)
        check_range("off_diagonal", self.off_diagonal, 0, 1)
        if isinstance(self.weight, tuple) and sum(self.weight) == 0:
            raise OptionError("weight", f"weights {list(self.weight)} sum to 0")

    def takes(self, parameter: Parameter) -> bool:
        """Whether this parameter goes the whole-matrix way: a linear layer whose inputs were measured."""
        return bool(parameter.statistics)

    def survey(self, parameter: Parameter) -> None:
        """No first pass."""

    def merge_tile(self, tile: Tile, stats: Any) -> np.ndarray:
        """The weighted mean, fp32 (n,)."""
        assert isinstance(self.weight, tuple)
        return weighted_sum(tile.models, self.weight, sum(self.weight))

    def merge_whole(
        self,
        base: np.ndarray | None,
        models: np.ndarray,
        parameter: Parameter,
        device: str | torch.device = "cpu",
        stats: Any = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Merge one linear layer.

        Args:
            base: None.
            models: fp32 (T, *shape). Overwritten.
            parameter: Names, shape, statistics.
            device: Where the linear algebra runs.
            stats: None.

        Returns:
            The merged matrix, and {"matrices", "full_rank", "ranks", "weights"} as TSV-M reports them.
        """
        import torch

        from weightsmith.tensors.spectra import one_thread

        assert isinstance(self.weight, tuple)
        turned = inputs_first(parameter.name, parameter.shape, parameter.config)
        with one_thread():
            weights_TMN = torch.from_numpy(models).to(device)
            weights_TMN = weights_TMN.mT if turned else weights_TMN
            inputs = weights_TMN.shape[-1]
            # A forecast tries the first rows of a matrix: where those are inputs, as many are looked at.
            grams = [
                torch.from_numpy(statistic.whole()[:inputs, :inputs]).to(device)
                for statistic in parameter.statistics
            ]
            merged = regmean(weights_TMN, grams, self.weight, self.off_diagonal)
            found = (merged.mT if turned else merged).contiguous().cpu().numpy()
        full = min(parameter.shape)
        share = [weight / sum(self.weight) * len(self.weight) for weight in self.weight]
        info = {
            "matrices": 1,
            "full_rank": float(full),
            "ranks": [float(full)] * len(models),
            "weights": share,
        }
        return found, info

    def whole_bytes(self, shape: Sequence[int], num_models: int) -> int:
        """Peak memory of `merge_whole` on a parameter of this shape, its models included, its base not."""
        numel = int(np.prod(shape, dtype=np.int64))
        return 4 * (num_models + 6) * numel + (32 + 4 * num_models) * shape[-1] ** 2

    def whole_flops(self, shape: Sequence[int], num_models: int) -> float:
        """Rough number of operations of `merge_whole` on a parameter of this shape."""
        rows, columns = shape[-2:]
        return float(columns) ** 2 * (2.0 * (num_models + 2) * rows + columns)


def regmean(
    models: Tensor, grams: Sequence[Tensor], weights: Sequence[float], off_diagonal: float = 0.9
) -> Tensor:
    """Merge one linear layer of T models.

    Args:
        models: (T, M, N).
        grams: T matrices (N, N), symmetric and not negative.
        weights: T numbers from 0 on, not all 0.
        off_diagonal: Factor of their off-diagonal entries.

    Returns:
        (M, N), of the dtype of `models`.
    """
    import torch

    total = float(sum(weights))
    mean = torch.zeros_like(models[0], dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        mean += model.double() * (weight / total)
    all_NN = torch.zeros(grams[0].shape, dtype=torch.float64, device=models.device)
    pull = torch.zeros_like(mean)
    for model, gram, weight in zip(models, grams, weights, strict=True):
        exact = gram.double() * weight
        diagonal = exact.diagonal().clone()
        exact *= off_diagonal
        exact.diagonal().copy_(diagonal)
        all_NN += exact
        pull += (model.double() - mean) @ exact
    if bool(pull.any()):
        mean += _solved(pull, all_NN)
    return mean.to(models.dtype)


def _solved(pull: Tensor, all_NN: Tensor) -> Tensor:
    """The pull times the (pseudo-)inverse: directions without inputs stay where they are."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(all_NN)
    diagonal = factor.diagonal()
    if not int(failed) and float(diagonal.min()) > _DROP**0.5 * float(diagonal.max()):
        return torch.cholesky_solve(pull.mT, factor).mT
    squares, turn = torch.linalg.eigh(all_NN)
    kept = squares > _DROP * squares[-1]
    return ((pull @ turn) * (torch.where(kept, squares, 1.0).reciprocal() * kept)) @ turn.mT
