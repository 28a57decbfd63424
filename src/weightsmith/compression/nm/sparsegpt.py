"""SparseGPT: prune column by column, and let the columns that are left make up for what goes.

Method  H = 2 X Xᵀ / n over the inputs, damped by `damp` times its mean diagonal; U the upper Cholesky factor
        of H⁻¹. At the first column of a group the M - N smallest W² / U_ii² of the group go, in each row, by
        the weights as they have become. Column i leaves the error e = (w - q) / U_ii, and all later columns
        lose e U_i,later. Inputs that are always 0 lose their weights.
Source  Frantar and Alistarh, arXiv:2301.00774. CONFIRMED (public code); the factor of H has no effect. Sums
        run group by group here and block by block, in another order than column by column.
Cost    I³ for the factor, O I² for the updates; three matrices of the weight's size in float32.
Letters O outputs, I inputs
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.compression.nm.groups import top_rows
from weightsmith.compression.nm.masks import expect_finite
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.errors import InputError


class Pruned(NamedTuple):
    """A pruned matrix.

    Attributes:
        weight: (O, I), float32; 0 where the mask is false.
        mask: bool (O, I).
    """

    weight: Tensor
    mask: Tensor


@torch.no_grad()
def sparsegpt_prune(
    weight: Tensor,
    hessian: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    block_size: int | None = None,
    damp: float = 0.01,
    name: str = "weight",
) -> Pruned:
    """Prune a matrix and update what it keeps.

    Args:
        weight: (O, I); left as it is.
        hessian: X Xᵀ over the inputs (I, I), any positive multiple of it; left as it is.
        n: Weights kept in each group.
        m: Size of a group; must divide I.
        block_size: Columns after which the rest of the matrix is updated at once, a multiple of `m`; by
            default 128, or the multiple of `m` below it.
        damp: Share of the mean diagonal that is added to the diagonal.
        name: For messages.

    Raises:
        InputError: sizes that don't fit; weights or statistics that are not finite; statistics that are no
            positive matrix even when damped.
    """
    pattern = Pattern(n, m)
    pattern.groups(name, tuple(weight.shape), 1)
    inputs = weight.shape[1]
    if block_size is None:
        block_size = max(1, 128 // m) * m
    if block_size % m:
        raise InputError(f"block_size must be a multiple of {m}, got {block_size}")
    if hessian.shape != (inputs, inputs):
        raise InputError(
            f"{name}: statistics of {list(hessian.shape)}, its weight of {list(weight.shape)} needs "
            f"[{inputs}, {inputs}]"
        )
    # Columns are rows here, so that each step reads and writes memory in order.
    work = torch.empty((inputs, len(weight)), dtype=torch.float32, device=weight.device)
    work.copy_(weight.detach().t())
    expect_finite(name, work)
    expect_finite(name, hessian, "statistics of its inputs")
    factor = _factor(hessian.float().clone(), work, damp, name)
    kept = torch.empty(work.shape, dtype=torch.bool, device=work.device)
    for first in range(0, inputs, block_size):
        last = min(first + block_size, inputs)
        block, upper = work[first:last], factor[first:last, first:last]
        errors = torch.empty_like(block)
        for at in range(0, last - first, m):
            group = slice(at, at + m)
            _prune_group(
                block[group], upper[group, group], kept[first + at : first + at + m], errors[group], n
            )
            block[at + m :].addmm_(upper[group, at + m :].t(), errors[group], alpha=-1)
        work[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    return Pruned(work.t().contiguous(), kept.t().contiguous())


def _prune_group(columns: Tensor, upper: Tensor, kept: Tensor, errors: Tensor, n: int) -> None:
    """Choose in a group's columns (M, O), prune them in turn, and note the error of each."""
    m = len(columns)
    scale = upper.diagonal()
    scores = (columns / scale[:, None]).square_()
    kept.copy_(top_rows(scores, n))
    left = kept.view(torch.uint8).to(columns.dtype)
    gone = (1 - left).div_(scale[:, None])  # what a column is multiplied with to be its error
    for j in range(m):
        torch.mul(columns[j], gone[j], out=errors[j])
        if j + 1 < m:
            columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    columns.mul_(left).add_(0.0)  # which makes -0 a 0


def _factor(hessian: Tensor, work: Tensor, damp: float, name: str) -> Tensor:
    """U with Uᵀ U = H⁻¹; clears the weights of inputs that are always 0."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    work[dead] = 0
    diagonal += damp * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return upper
    raise InputError(
        f"{name}: the statistics of its inputs are no positive matrix, even with damp {damp}; give more "
        "calibration data or a larger damp"
    )
