"""The rank of each matrix's directions.

A number; patterns with a number each; or the paper's rule: the gradient of a matrix can't have a higher rank
than the weights it came through, so all matrices of a block take the smallest numeric rank in it (arXiv:
2501.19057, Eq. 5 and 6; the threshold is ours, as the paper's is not public).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.checkpoints.names import nearest_tensor
from weightsmith.errors import InputError
from weightsmith.tensors.spectra import truncated_svd
from weightsmith.training.tezo.options import TeZOOptions

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
"""A name up to its first number: of the encoder and the decoder the third blocks are two."""


class Matrix(NamedTuple):
    """A parameter as matrices.

    Attributes:
        name: Of the parameter.
        value: (E, M, N), sharing the parameter's memory where it can.
    """

    name: str
    value: Tensor


def chosen_ranks(matrices: Sequence[Matrix], options: TeZOOptions) -> dict[str, int]:
    """Rank by name, at most the smaller side.

    Raises:
        InputError: a pattern that matches nothing; a matrix that no pattern matches.
    """
    wanted = dict.fromkeys((matrix.name for matrix in matrices), 0)
    if isinstance(options.rank, dict):
        for pattern in options.rank:
            if not any(fnmatchcase(name, pattern) for name in wanted):
                hint = nearest_tensor(pattern, wanted)
                raise InputError(f"rank: `{pattern}` matches no matrix that is trained{hint}")
        for name in wanted:
            fitting = [rank for pattern, rank in options.rank.items() if fnmatchcase(name, pattern)]
            if not fitting:
                raise InputError(f"rank: no pattern matches {name}; end with `'*': <rank>` for all others")
            wanted[name] = fitting[0]
    elif options.rank == "auto":
        wanted = automatic_ranks(matrices, options)
    else:
        wanted = dict.fromkeys(wanted, options.rank)
    capped = {matrix.name: min(wanted[matrix.name], *matrix.value.shape[-2:]) for matrix in matrices}
    lower = [name for name in capped if capped[name] < wanted[name]]
    if lower and options.rank != "auto":
        logger.warning(
            "TeZO: %d matrices have a side shorter than the rank, which is lowered to it (%s: %d)",
            len(lower),
            lower[0],
            capped[lower[0]],
        )
    return capped


def automatic_ranks(matrices: Sequence[Matrix], options: TeZOOptions) -> dict[str, int]:
    """The paper's rule: the smallest numeric rank of a block, in min_rank..max_rank; a matrix outside of
    blocks has its own. Zeros, as an adapter begins with, say nothing: they take the rank of their block.
    """
    ranks = {matrix.name: numeric_rank(matrix.value, options) for matrix in matrices}
    blocks: dict[str, list[str]] = {}
    for name in ranks:
        block = _BLOCK.match(name)
        blocks.setdefault(block.group() if block else name, []).append(name)
    found: dict[str, int] = {}
    for names in blocks.values():
        told = [ranks[name] for name in names if ranks[name]]
        if not told:
            logger.warning(
                "TeZO: %s and what else is in its block are all zeros, which have no rank to go by; they get "
                "max_rank (%d)",
                names[0],
                options.max_rank,
            )
        smallest = min(told, default=options.max_rank)
        found |= dict.fromkeys(names, max(options.min_rank, smallest))
    return {name: found[name] for name in ranks}


@torch.no_grad()
def numeric_rank(value: Tensor, options: TeZOOptions) -> int:
    """Singular values above `rank_threshold` of the largest, at most `max_rank`; of stacked matrices
    (..., M, N) the smallest, of zeros alone 0.
    """
    matrices = value.detach().flatten(0, -3) if value.ndim > 2 else value.detach()[None]
    most = min(options.max_rank, *matrices.shape[-2:])
    found = []
    for matrix in matrices:
        wide = matrix.float() if matrix.dtype.itemsize < 4 else matrix
        values = truncated_svd(wide, most).s
        if values[0] > 0:
            found.append(int((values > options.rank_threshold * values[0]).sum()))
    return min(found, default=0)
