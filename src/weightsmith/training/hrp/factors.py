"""Singular vectors of a product of two thin matrices, without the product.

Both factors are cut down to triangles by QR, and the SVD is that of a matrix as small as the rank: O((M + N)
R^2) in place of O(M N min(M, N)), and nothing of size M x N exists.

Letters  M rows and N columns of the product, R rank of the factors, K directions kept
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.tensors.spectra import Triplets

DUST = 1e-5
"""A singular value below this part of the largest is rounding: its vector says nothing."""


class Principal(NamedTuple):
    """The leading part of a product.

    Attributes:
        triplets: u (M, K), s (all of them, largest first), v (N, K); each column of v has its largest entry
            positive.
        known: How many of the K directions the product has; the others are random, orthogonal to them.
    """

    triplets: Triplets
    known: int


@torch.no_grad()
def principal(left_MR: Tensor, right_NR: Tensor, count: int, *, seed: int = 0) -> Principal:
    """The `count` leading singular triplets of left @ right^T.

    Args:
        left_MR: fp32 or fp64 factor; 16 bits are widened.
        right_NR: The other, of the same dtype and device.
        count: K, at least 1. Beyond the smaller side of the product vectors can't be orthogonal; those are
            random unit vectors.
        seed: Of the directions that the product doesn't have.
    """
    wide = torch.promote_types(left_MR.dtype, torch.float32)
    left_MR, right_NR = left_MR.detach().to(wide), right_NR.detach().to(wide)
    left_q, left_r = torch.linalg.qr(left_MR)
    right_q, right_r = torch.linalg.qr(right_NR)
    # As small as the rank: fp64 on the CPU costs nothing there, and gives every device the same vectors.
    core = left_r.double().cpu() @ right_r.double().cpu().mT
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    found = min(count, len(s))
    known = int((s[:found] > DUST * s[0]).sum()) if float(s[0]) > 0 else 0
    u, v = left_q @ u[:, :known].to(left_q), right_q @ vh[:known].mT.to(right_q)
    signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign() if known else v.new_ones(1, 0)
    u, v = filled(u * signs, count, seed), filled(v * signs, count, seed + 1)
    return Principal(Triplets(u, s.to(wide), v), known)


@torch.no_grad()
def filled(basis_NK: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal columns, followed by random ones orthogonal to them until there are `count`.

    Args:
        basis_NK: What there is, possibly nothing: (N, 0).
        count: Columns wanted; beyond N of them, unit columns.
        seed: Of the random ones; the same on every device.
    """
    size, have = basis_NK.shape
    if have >= count:
        return basis_NK[:, :count]
    drawn = torch.randn(size, count - have, generator=torch.Generator().manual_seed(seed % 2**63))
    drawn = drawn.to(basis_NK)
    room = min(count, size) - have
    parts = [basis_NK]
    if room > 0:
        free = drawn[:, :room]
        for _ in range(2):  # once leaves what rounding does not let go of
            free = torch.linalg.qr(free - basis_NK @ (basis_NK.mT @ free))[0]
        parts.append(free)
    rest = drawn[:, max(room, 0) :]
    parts.append(rest / rest.norm(dim=0, keepdim=True))
    return torch.cat(parts, 1)


def defect(columns_NK: Tensor) -> float:
    """How far columns are from orthonormal: the largest entry of |columns^T columns - 1|."""
    wide = columns_NK.double()
    return float(
        (wide.mT @ wide - torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)).abs().max()
    )


def shared_ranks(spectra: list[Tensor], ranks: list[int], energy: float) -> list[int]:
    """Ranks of layers, shared out anew by the parts that their directions have in their energy; the sum
    stays.

    Args:
        spectra: Singular values of each layer.
        ranks: What each layer had.
        energy: No layer gets more than this many times its own.
    """
    parts = []
    for layer, (values, rank) in enumerate(zip(spectra, ranks, strict=True)):
        squares = values.double().square()
        total = float(squares.sum()) or 1.0
        most = min(int(rank * energy), int((values > 0).sum()))
        parts += [(float(square) / total, layer) for square in squares[1:most]]
    found = [1] * len(ranks)  # every layer keeps its first
    parts.sort(key=lambda part: (-part[0], part[1]))
    for _, layer in parts[: sum(ranks) - len(ranks)]:
        found[layer] += 1
    return found
