"""Exponents of all matrices of a model, on one device or shared out between the ranks of a group.

Each matrix has one owner, which computes its exponent; a sum over ranks then gives every rank the same
numbers, bit for bit. Replicas that each computed all of them could drift apart: two builds of LAPACK don't
agree in the last bit. Sharded parameters (DTensor) are gathered one matrix a rank at a time, so no rank ever
holds more than one whole matrix beside its own, and the values are those of the unsharded model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from weightsmith.errors import InputError
from weightsmith.runs.seeds import derive
from weightsmith.tensors.esd import alpha_hill, alpha_hill_square, by_shape
from weightsmith.training.alphadecay.matrices import Matrix
from weightsmith.training.alphadecay.options import AlphaDecayOptions


def exponents(
    matrices: Sequence[Matrix], options: AlphaDecayOptions, group: dist.ProcessGroup | None
) -> tuple[np.ndarray, list[str]]:
    """The exponent of each matrix; for one of several pieces, None of which is its own: see `Matrix.pieces`.

    Args:
        matrices: The same on every rank.
        options: `metric`, `tail_fraction` and `hill_convention` count.
        group: The ranks that share the work; None for this process alone.

    Returns:
        fp64 (L, P), P the largest number of pieces, NaN where a matrix has fewer or a spectrum has no tail;
        and the names of matrices that hold NaN or infinity.
    """
    rank, world = (group.rank(), group.size()) if group is not None else (0, 1)
    order = sorted(range(len(matrices)), key=lambda index: -matrices[index].cost())
    most = max(len(matrix.piece_shapes()) for matrix in matrices)
    # One row more than pieces: whether the matrix is broken.
    table = torch.zeros(len(matrices), most + 1, dtype=torch.float64)
    if any(isinstance(matrix.parameter, DTensor) for matrix in matrices):
        for start in range(0, len(order), world):
            mine = None
            for offset, index in enumerate(order[start : start + world]):
                whole = _whole(matrices[index].parameter)  # every rank takes part
                mine = (index, whole) if offset == rank else mine
            if mine is not None:
                _fill(table, [mine], matrices, options)
    else:
        own = [(index, matrices[index].parameter.detach()) for index in order[rank::world]]
        _fill(table, own, matrices, options)
    if group is not None:
        table = _summed(table, group, matrices[0].parameter.device)
    counts = np.array([len(matrix.piece_shapes()) for matrix in matrices])
    values = table.numpy()
    alphas = np.where(np.arange(most) < counts[:, None], values[:, :-1], np.nan)
    return alphas, [matrix.name for matrix, broken in zip(matrices, values[:, -1], strict=True) if broken]


def gradient_norms(matrices: Sequence[Matrix]) -> np.ndarray:
    """fp64 (L,): Euclidean norm of each matrix's gradient, NaN where it has none."""
    norms = []
    for matrix in matrices:
        gradient = matrix.parameter.grad
        norm = torch.tensor(torch.nan) if gradient is None else torch.linalg.vector_norm(gradient)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.stack([norm.double().cpu() for norm in norms]).numpy()


def world_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group`, or all ranks where torch.distributed runs on several, or None."""
    if group is not None:
        return group
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def check_same_names(matrices: Sequence[Matrix], group: dist.ProcessGroup) -> None:
    """Refuse ranks that hold different models (stages of a pipeline): their sums would mix.

    Raises:
        InputError: the names differ.
    """
    mine = derive(0, *(matrix.name for matrix in matrices))
    device = _wire(group, matrices[0].parameter.device)
    extremes = torch.tensor([mine, -mine], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    if extremes[0] != -extremes[1]:
        raise InputError(
            "the ranks hold different matrices, so they can't share AlphaDecay's work: pass `group`, the "
            "ranks that hold the same part of the model"
        )


def _fill(
    table: Tensor, own: Sequence[tuple[int, Tensor]], matrices: Sequence[Matrix], options: AlphaDecayOptions
) -> None:
    """Write the exponents of the matrices `own` (index, values) into their rows of `table`."""
    pieces = [
        (index, number, piece)
        for index, whole in own
        for number, piece in enumerate(matrices[index].pieces(whole))
    ]
    if not pieces:
        return
    # A batch gains on a GPU only; its copy in fp32 is no larger than the largest matrix.
    largest = max(piece.numel() for _, _, piece in pieces)
    room = 1 if pieces[0][2].device.type == "cpu" else largest
    for batch in by_shape([tuple(piece.shape) for _, _, piece in pieces], room):
        chosen = [pieces[position] for position in batch]
        try:
            alphas = _alphas(
                [piece for _, _, piece in chosen], [matrices[index].name for index, _, _ in chosen], options
            )
            for (index, number, _), alpha in zip(chosen, alphas.tolist(), strict=True):
                table[index, number] = alpha
        except InputError:
            for index, number, piece in chosen:
                finite = bool(torch.isfinite(piece).all())
                table[index, number] = (
                    _alphas([piece], [matrices[index].name], options)[0] if finite else torch.nan
                )
                table[index, -1] += 0 if finite else 1


def _alphas(pieces: Sequence[Tensor], names: Sequence[str], options: AlphaDecayOptions) -> Tensor:
    tail, convention = options.tail_fraction, options.hill_convention
    if options.metric == "alpha_hill":
        batch = pieces[0][None] if len(pieces) == 1 else torch.stack([piece.float() for piece in pieces])
        return alpha_hill(batch, tail_fraction=tail, convention=convention)
    return torch.stack(
        [
            alpha_hill_square(piece, derive(0, name), tail_fraction=tail, convention=convention)
            for piece, name in zip(pieces, names, strict=True)
        ]
    )


def _whole(parameter: Tensor) -> Tensor:
    local = parameter.detach()
    return local.full_tensor() if isinstance(local, DTensor) else local


def _summed(table: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    wire = table.to(_wire(group, device))
    dist.all_reduce(wire, group=group)
    return wire.cpu()


def _wire(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where a tensor must lie for `group` to send it."""
    return device if dist.get_backend(group) == "nccl" else torch.device("cpu")
