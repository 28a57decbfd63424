"""WUDI: the merged change that disturbs each fine-tune least on the inputs its own change points to.

Problem  Added changes disturb one another on the inputs of each task; without data those inputs are unknown.
Method   The rows of a task's change to a linear layer lie in the space of that task's inputs. Per matrix:
         minimise  L(D) = sum_t |(D - D_t) D_t^T|^2 / |D_t|^2   by `steps` of Adam from D = sum_t D_t
         W = W_0 + D;  what is no matrix, and every excluded name: W = W_0 + mean D_t.
Source   Cheng et al., arXiv:2503.08099, and its public code (Adam, 300 steps, learning rate 1e-5). The loss
         is quadratic, so that two sums stand for all tasks: grad L = 2 (D A - B) with
         A = sum_t D_t^T D_t / |D_t|^2 and B = sum_t D_t D_t^T D_t / |D_t|^2; the code goes through every
         task at every step.
Decided  `solver: exact` takes the minimum that the steps walk to instead, within the rows of the changes:
         D = B A^+ (eigenvalues up to 1e-6 of the largest count as 0). A task that changed nothing is left
         out.
Limits   A step moves an entry by up to `lr`, whatever the size of the changes is: 300 steps of 1e-5 are a
         long way for a gently tuned language model, where a hundredth of the changes' size is apt.
Memory   Whole matrices: the T changes, about five more of their size, and two of (inputs, inputs).
Letters  T tasks, M outputs, N inputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from weightsmith.merging.options import OptionError, check_range
from weightsmith.merging.spectral import Change, MatrixChanges, each_model

if TYPE_CHECKING:
    from torch import Tensor

_DROP = 1e-6


@dataclass(frozen=True, kw_only=True)
class Wudi(MatrixChanges):
    """Options of WUDI.

    Attributes:
        solver: `adam` walks `steps` from the sum of the changes, `exact` is the minimum itself.
        steps: Steps of Adam.
        lr: Learning rate of Adam, in units of the weights.
    """

    solver: Literal["adam", "exact"] = "adam"
    steps: int = 300
    lr: float = 1e-5

    by_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise OptionError("steps", f"must be a whole number from 0 on, got {self.steps}")
        check_range("lr", self.lr, 0, open_low=True)

    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""
        import torch

        tasks = len(deltas)
        for delta, strength in zip(deltas, each_model(self.alpha, tasks), strict=True):
            delta.mul_(strength)
        sizes = [float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2 for delta in deltas]
        active = [task for task in range(tasks) if sizes[task] > 0]
        if not active:
            return Change(None, [0] * tasks, [1.0] * tasks)
        changed = [deltas[task] for task in active]  # views: an index would copy them
        values = wudi(changed, [sizes[t] for t in active], solver=self.solver, steps=self.steps, lr=self.lr)
        q = min(deltas.shape[-2:])
        return Change(values, [q * (task in active) for task in range(tasks)], [1.0] * tasks)

    def whole_bytes(self, shape: Sequence[int], num_models: int) -> int:
        """Peak memory of `merge_whole` on a parameter of this shape, its models included, its base not."""
        rows, columns = shape[-2:]
        extra = 4 * (5 * rows * columns + 3 * columns * columns)
        return super().whole_bytes(shape, num_models) + extra

    def whole_flops(self, shape: Sequence[int], num_models: int) -> float:
        """Rough number of operations of `merge_whole` on a parameter of this shape."""
        rows, columns = shape[-2:]
        stack = float(np.prod(shape[:-2], dtype=np.int64))
        steps = self.steps if self.solver == "adam" else 10
        return stack * 2.0 * rows * columns**2 * (2 * num_models + steps)


def wudi(
    deltas: Sequence[Tensor] | Tensor,
    sizes: Sequence[float],
    *,
    solver: Literal["adam", "exact"] = "adam",
    steps: int = 300,
    lr: float = 1e-5,
) -> Tensor:
    """The merged change of T tasks.

    Args:
        deltas: T of fp32 or fp64 (M, N), none of them zero. Left untouched.
        sizes: Sum of squares of each.
        solver: See `Wudi`.
        steps: See `Wudi`.
        lr: See `Wudi`.

    Returns:
        (M, N).
    """
    import torch

    inputs = deltas[0].shape[-1]
    a_NN = deltas[0].new_zeros(inputs, inputs)
    b_MN = torch.zeros_like(deltas[0])
    for delta, size in zip(deltas, sizes, strict=True):
        share = (delta.mT @ delta).div_(size)
        b_MN += delta @ share
        a_NN += share
    if solver == "exact":
        squares, turn = torch.linalg.eigh(a_NN.double())
        kept = squares > _DROP * squares[-1]
        inverse = (turn * (torch.where(kept, squares, 1.0).reciprocal() * kept)) @ turn.mT
        return (b_MN.double() @ inverse).to(b_MN.dtype)
    merged = deltas[0].clone()
    for delta in deltas[1:]:
        merged += delta
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        gradient = (merged @ a_NN).sub_(b_MN).mul_(2)
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = square.div(1 - 0.999**step).sqrt_().add_(1e-8)
        merged.addcdiv_(mean, scale, value=-lr / (1 - 0.9**step))
    return merged
