"""N:M masks: made of scores, checked, repaired.

Problem  Sparse tensor cores take matrices with at most N non-zeros in every M consecutive inputs of a row; a
         mask of any other shape saves nothing.
Method   The N largest scores of each group; ties keep the lower index, so every device gives the same mask.
Source   Mishra et al., arXiv:2104.08378.
Cost     M (M - 1) / 2 comparisons a group; temporaries of a cache-sized piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.compression.nm.groups import (
    chunks,
    code_dtype,
    count_kept,
    grouped,
    mask_from,
    ranks,
    to_codes,
    to_rows,
    top_codes,
)
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.errors import InputError


def nm_mask(score: Tensor, n: int = 2, m: int = 4, *, dim: int = -1) -> Tensor:
    """Mask that keeps the `n` entries of largest score in every `m` along the inputs.

    Args:
        score: Floating point, any shape, with the inputs on axis `dim`.
        n: Entries kept, below `m`.
        m: Size of a group; must divide the inputs.
        dim: The axis of the inputs.

    Returns:
        bool, of the shape and on the device of `score`; exactly `n` are true in each group.

    Raises:
        InputError: the inputs don't divide; a score is NaN.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 4.0, 1.0, 2.0]]))
        tensor([[ True,  True, False, False]])
    """
    pattern = Pattern(n, m)
    pattern.groups("score", tuple(score.shape), dim)
    codes = codes_of_scores("score", score, pattern, dim)
    return mask_from(codes, m, tuple(score.shape), dim)


def codes_of_scores(name: str, score: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """The mask of the largest scores as one integer for each group.

    Raises:
        InputError: a score is NaN; names where.
    """
    groups = grouped(score.detach(), pattern.m, dim).flatten(0, -2)
    codes = torch.empty(len(groups), dtype=code_dtype(pattern.m), device=score.device)
    for part in chunks(len(groups), pattern.m, score.device):
        piece = groups[part]
        rows = torch.empty((pattern.m, len(piece)), dtype=torch.float32, device=score.device)
        for j, row in enumerate(rows.unbind(0)):
            row.copy_(piece[:, j])
        codes[part] = top_codes(rows, pattern.n)
        # A sum is NaN where an entry is; or where infinities meet, which the second look tells apart.
        if rows.sum().isnan() and rows.isnan().any():
            first = part.start + int(rows.isnan().any(0).nonzero()[0])
            raise InputError(f"{name}: a score in group {first} is NaN; the weights or the statistics are")
    return codes


def codes_of_mask(name: str, mask: Tensor, pattern: Pattern, dim: int) -> Tensor:
    """A mask as one integer for each group: bool of any shape -> (G,).

    Raises:
        InputError: a group doesn't keep exactly N; says how many don't and where the first is.
    """
    pattern.groups(name, tuple(mask.shape), dim)
    codes = to_codes(grouped(mask, pattern.m, dim).flatten(0, -2).t())
    wrong = (count_kept(codes, pattern.m) != pattern.n).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"{name}: {len(wrong)} of {len(codes)} groups don't keep exactly {pattern.n} of {pattern.m}; the "
            f"first is group {first}, which keeps {int(count_kept(codes[first : first + 1], pattern.m))}. "
            "`repair_mask` completes them"
        )
    return codes


def expect_finite(name: str, values: Tensor, what: str = "weights") -> None:
    """Raise `InputError` where values of a parameter are NaN or infinite; says how many."""
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise InputError(f"{name}: {wrong} of {values.numel()} {what} are NaN or infinite")


def repair_mask(mask: Tensor, weight: Tensor, n: int = 2, m: int = 4, *, dim: int = -1) -> tuple[Tensor, int]:
    """Complete a mask to exactly `n` of `m`, by the magnitude of the dense weight.

    A mask that was read off a sparse matrix as W != 0 lacks what happened to be 0. Groups with too few gain
    their largest weights, those with too many lose their smallest.

    Returns:
        The mask, and how many groups had to change.
    """
    Pattern(n, m).groups("mask", tuple(mask.shape), dim)
    magnitude = to_rows(weight.detach().float().abs(), m, dim)
    if not magnitude.isfinite().all():
        raise InputError("a weight is NaN or infinite: no mask of it can be repaired")
    kept = to_rows(mask, m, dim)
    # What is kept comes before all that is not, and the largest first among each.
    codes = top_codes(kept.short() * m - ranks(magnitude), n)
    changed = int((codes != to_codes(kept)).sum())
    return mask_from(codes, m, tuple(mask.shape), dim), changed
