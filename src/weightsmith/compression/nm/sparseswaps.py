"""SparseSwaps: exchange kept and pruned weights of a group as long as the layer's output comes closer.

Problem  Scores judge each weight by itself; what a pruned weight costs depends on what else goes in its row.
Method   With H = X Xᵀ over the inputs and d the pruned part of a row, the row's squared error on these inputs
         is d H dᵀ, so what a swap would change of it is known exactly from H d. Group after group takes its
         best swap, if one helps, in all rows at once; sweeps go on until none helps. Weights that are kept
         stay as they are.

             prune u, restore p:   Δ = 2 w_u (dH)_u - 2 w_p (dH)_p + w_u² H_uu + w_p² H_pp - 2 w_u w_p H_up

Source   Zimmer et al., arXiv:2512.10922. CONFIRMED (its abstract): rows apart, exact swaps by the Gram
         matrix, any mask to begin with. RECONSTRUCTED: the order of swaps, each group its own in turn.
Cost     A sweep is 4 O I² operations in products of matrices, and some 20 M passes over the weight; five
         matrices of its size in float32.
Letters  O outputs, I inputs, M entries of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.compression.nm.masks import expect_finite
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.errors import InputError

_WORTH = 1e-5
"""Share of a group's own error below which a gain is rounding."""


@torch.no_grad()
def sparseswaps_mask(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor,
    n: int = 2,
    m: int = 4,
    *,
    sweeps: int = 20,
    block_size: int = 128,
    name: str = "weight",
) -> Tensor:
    """Improve the mask of a matrix.

    Args:
        weight: (O, I); left as it is.
        hessian: X Xᵀ over the inputs (I, I), any positive multiple of it; left as it is.
        mask: bool (O, I), to begin with; keeps exactly `n` of each group.
        n: Weights kept in each group.
        m: Size of a group; must divide I.
        sweeps: Most passes over all groups; it ends earlier where no swap helps.
        block_size: Inputs after which all others learn of the swaps at once, in whole groups.
        name: For messages.

    Returns:
        bool (O, I). No row's error is larger than with the mask it began with, to rounding.

    Raises:
        InputError: sizes that don't fit; weights or statistics that are not finite.

    Example:
        >>> weight, squares = torch.tensor([[2.0, -2.1]]), torch.eye(2)
        >>> sparseswaps_mask(weight, squares, torch.tensor([[True, False]]), 1, 2)
        tensor([[False,  True]])
    """
    Pattern(n, m).groups(name, tuple(weight.shape), 1)
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs) or mask.shape != weight.shape:
        raise InputError(
            f"{name}: statistics of {list(hessian.shape)} and a mask of {list(mask.shape)}, its weight of "
            f"{list(weight.shape)} needs [{inputs}, {inputs}] and its own shape"
        )
    # Inputs are rows here, so that each step reads and writes memory in order.
    work = torch.empty((inputs, len(weight)), dtype=torch.float32, device=weight.device)
    work.copy_(weight.detach().t())
    expect_finite(name, work)
    expect_finite(name, hessian, "statistics of its inputs")
    hessian = hessian.float()
    kept = mask.t().contiguous()
    step = max(1, block_size // m) * m
    for _ in range(sweeps):
        gone = work * ~kept
        slope = hessian @ gone  # anew in each sweep: sums of updates would gather rounding
        swapped = False
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            block = slice(first, last)
            before = gone[block].clone()
            for at in range(first, last, m):
                group = slice(at, at + m)
                change = _swap(work[group], kept[group], slope[group], hessian[group, group])
                if change is not None:
                    swapped = True
                    gone[group] += change
                    slope[block].addmm_(hessian[block, group], change)
            change = gone[block] - before
            slope[:first].addmm_(hessian[:first, block], change)
            slope[last:].addmm_(hessian[last:, block], change)
        if not swapped:
            break
    return kept.t().contiguous()


def _swap(weight: Tensor, kept: Tensor, slope: Tensor, hessian: Tensor) -> Tensor | None:
    """Take the best swap of a group in each row where one helps.

    Args:
        weight: (M, O).
        kept: bool (M, O); changed in place.
        slope: H d, (M, O).
        hessian: The group's own part, (M, M).

    Returns:
        What was added to the pruned part d, (M, O); None where no row swapped.
    """
    own = weight.square() * hessian.diagonal()[:, None]
    pull = 2 * weight * slope
    prune = torch.where(kept, own + pull, torch.inf)
    restore = torch.where(kept, torch.inf, own - pull)
    both = 2 * hessian[:, :, None] * weight[:, None] * weight[None]
    gain, pair = (prune[:, None] + restore[None] - both).flatten(0, 1).min(0)
    helps = gain < -_WORTH * own.sum(0)
    if not helps.any():
        return None
    m = len(weight)
    pruned, restored = (pair // m)[None], (pair % m)[None]
    change = torch.zeros_like(weight)
    change.scatter_(0, pruned, weight.gather(0, pruned) * helps)
    change.scatter_(0, restored, -weight.gather(0, restored) * helps)
    swaps = torch.zeros_like(kept).scatter_(0, pruned, helps[None]).scatter_(0, restored, helps[None])
    kept.logical_xor_(swaps)
    return change
