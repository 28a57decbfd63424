"""Gradient norms that are the same on one process and on many.

Problem  Under FSDP2 and tensor parallelism `p.grad` is a `DTensor` that holds a piece of the gradient, and
         the norm of a piece is not the norm. `torch.linalg.vector_norm` of a DTensor returns one whose local
         part is still the norm of the piece.
Method   Squares of the local pieces in one vector (one foreach launch per dtype), one all-reduce of that
         vector per mesh axis along which any parameter is sharded, then the root. Along such an axis a
         replicated parameter counts on the first rank only, so that nothing counts twice; an axis with
         replicas alone (DDP, the outer axis of HSDP) is not summed at all, since its gradients are equal
         already.
Dtypes   Norms of pieces accumulate in float32 at least; the squares of the vector in float64 where the device
         has it, which can neither overflow nor lose a tensor of tiny gradients.
Letters  P parameters, S slots (one for each parameter, or one for each slice of a stacked one)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from weightsmith.errors import InputError


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor: a `DTensor`'s shard, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local_gradient(parameter: Tensor, name: str = "a parameter") -> Tensor | None:
    """This process's piece of `parameter.grad`, sharing its memory; None where there is no gradient.

    A gradient that still waits for its reduction (a `Partial` DTensor) is reduced to the parameter's
    placement first, in place of the old one; every rank must then call this in the same order.

    Raises:
        InputError: the gradient is sparse, or lives on another mesh than its parameter.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        raise InputError(f"{name}: its gradient is sparse; use dense embeddings (sparse=False)")
    if isinstance(parameter, DTensor):
        if not isinstance(gradient, DTensor) or gradient.device_mesh != parameter.device_mesh:
            raise InputError(f"{name}: its gradient is not sharded over the parameter's own mesh")
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
    piece = local(gradient)
    return torch.view_as_real(piece) if piece.is_complex() else piece


@dataclass(frozen=True, slots=True)
class Slots:
    """Where one parameter's norms stand in the vector.

    Attributes:
        start: First slot.
        count: Slots: 1, or the length of the stacked axis.
        axis: The stacked axis; None where the parameter is one tensor.
        local_start: First slot that this process's piece has a part of.
        local_count: Slots that it has a part of.
    """

    start: int
    count: int
    axis: int | None
    local_start: int
    local_count: int


@dataclass(frozen=True, slots=True)
class _Mesh:
    """The sums of one device mesh: its slots, what this rank counts of each, the groups to sum over."""

    slots: Tensor | None
    counted: Tensor
    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device


class TensorNorms:
    """Squared norms of lists of tensors laid out like `parameters`, over all processes.

    Args:
        parameters: In an order that is the same on every process.
        stacked: For each parameter the axis along which it stacks independent tensors (experts), or None.
        names: For messages; one for each parameter.

    Raises:
        InputError: a parameter is sharded in a way whose norms can't be known (FSDP1's flat parameters,
            partial sums).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        stacked: Sequence[int | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        stacked = stacked or [None] * len(parameters)
        names = names or [f"parameter {i}" for i in range(len(parameters))]
        self.slots: list[Slots] = []
        start = 0
        for parameter, axis, name in zip(parameters, stacked, names, strict=True):
            _refuse_foreign_sharding(parameter, name)
            self.slots.append(_slots(parameter, axis, start, name))
            start += self.slots[-1].count
        self.num_slots = start
        self.device = local(parameters[0]).device
        self._double = torch.float32 if self.device.type == "mps" else torch.float64
        self._zeros = {
            count: torch.zeros(count, device=self.device) for count in {s.count for s in self.slots}
        }
        self._meshes = self._sums(parameters)

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Squared norms over all processes, (S,) float64; 0 where a tensor is None on every process."""
        return self.reduce(self.squares(tensors))

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Squared norms of this process's pieces, (S,) float64."""
        pieces: list[Tensor] = [self._zeros[slots.count] for slots in self.slots]
        whole: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
        for index, (tensor, slots) in enumerate(zip(tensors, self.slots, strict=True)):
            if tensor is not None and slots.axis is None:
                whole.setdefault((tensor.device, tensor.dtype), {})[index] = tensor
            elif tensor is not None:
                pieces[index] = self._slice_norms(tensor, slots)
        for (device, dtype), chosen in whole.items():
            # Sums of squares in 16 bits stop growing; float32 and float64 keep their own.
            wide = torch.float32 if dtype.itemsize < 4 else None
            norms = torch._foreach_norm(list(chosen.values()), 2, dtype=wide)
            if device == self.device and len(chosen) == self.num_slots:
                return torch.stack(norms).to(self._double).square_()
            for index, norm in zip(chosen, norms, strict=True):
                pieces[index] = norm.reshape(1).to(self.device, non_blocking=True)
        return torch.cat([piece.to(self._double) for piece in pieces]).square_()

    def reduce(self, squares: Tensor) -> Tensor:
        """Sums of squares over the processes that hold pieces, (S,): one all-reduce per sharded mesh axis."""
        for mesh in self._meshes:
            part = squares if mesh.slots is None else squares[mesh.slots]
            part = (part * mesh.counted).to(mesh.device)
            for group in mesh.groups:
                dist.all_reduce(part, group=group)
            part = part.to(squares.device)
            squares = part if mesh.slots is None else squares.index_copy(0, mesh.slots, part)
        return squares

    def _slice_norms(self, tensor: Tensor, slots: Slots) -> Tensor:
        """Norms of the slices of a stacked tensor, zeros for slices on other processes."""
        others = [axis for axis in range(tensor.ndim) if axis != slots.axis]
        wide = torch.float32 if tensor.dtype.itemsize < 4 else None
        norms = torch.linalg.vector_norm(tensor, 2, dim=others, dtype=wide).to(self.device)
        if slots.local_count == slots.count:
            return norms
        padded = norms.new_zeros(slots.count)
        padded[slots.local_start : slots.local_start + slots.local_count] = norms
        return padded

    def _sums(self, parameters: Sequence[Tensor]) -> list[_Mesh]:
        members: dict[dist.DeviceMesh, list[int]] = {}
        for index, parameter in enumerate(parameters):
            if isinstance(parameter, DTensor):
                members.setdefault(parameter.device_mesh, []).append(index)
        sums = []
        for mesh, indices in members.items():
            sharded = [[_splits(p) for p in parameters[i].placements] for i in indices]  # pyrefly: ignore
            axes = [axis for axis in range(mesh.ndim) if any(row[axis] for row in sharded)]
            if not axes:
                continue
            coordinate = mesh.get_coordinate() or [0] * mesh.ndim
            counted: list[float] = []
            slots: list[int] = []
            for index, row in zip(indices, sharded, strict=True):
                first = all(row[axis] or coordinate[axis] == 0 for axis in axes)
                counted += [float(first)] * self.slots[index].count
                slots += range(self.slots[index].start, self.slots[index].start + self.slots[index].count)
            everything = len(slots) == self.num_slots
            sums.append(
                _Mesh(
                    slots=None if everything else torch.tensor(slots, device=self.device),
                    counted=torch.tensor(counted, dtype=self._double, device=self.device),
                    groups=tuple(mesh.get_group(axis) for axis in axes),
                    # Shards offloaded to the CPU are still summed by the group's own backend.
                    device=self.device
                    if self.device.type == mesh.device_type
                    else torch.device(mesh.device_type),
                )
            )
        return sums


def spread(slots: Slots, values_S: Tensor, ndim: int) -> Tensor:
    """Values of one parameter's slots, shaped to multiply its local piece: 0-d, or along the stacked axis."""
    if slots.axis is None:
        return values_S[slots.start]
    begin = slots.start + slots.local_start
    shape = [1] * ndim
    shape[slots.axis] = slots.local_count
    return values_S[begin : begin + slots.local_count].view(shape)


def _splits(placement: object) -> bool:
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, Shard | _StridedShard)


def _slots(parameter: Tensor, axis: int | None, start: int, name: str) -> Slots:
    if axis is None:
        return Slots(start, 1, None, 0, 1)
    if not -parameter.ndim <= axis < parameter.ndim or parameter.ndim < 2:
        raise InputError(f"{name}: no axis {axis} to stack along in shape {tuple(parameter.shape)}")
    if parameter.is_complex():
        raise InputError(f"{name}: a complex parameter can't be stacked")
    axis %= parameter.ndim
    count = parameter.shape[axis]
    if not isinstance(parameter, DTensor):
        return Slots(start, count, axis, 0, count)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    along = [p for p in parameter.placements if _splits(p) and p.dim % parameter.ndim == axis]  # pyrefly: ignore
    if any(not isinstance(placement, Shard) for placement in along):
        raise InputError(f"{name}: its stacked axis {axis} is sharded in strides; shard another axis")
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return Slots(start, count, axis, min(offset[axis], count), shape[axis])


def _refuse_foreign_sharding(parameter: Tensor, name: str) -> None:
    if getattr(parameter, "_is_flat_param", False) or type(parameter).__name__ == "FlatParameter":
        raise InputError(
            f"{name}: FSDP1 has flattened the parameters into one, so single tensors have no norm; "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(parameter, "ds_id"):
        raise InputError(
            f"{name}: DeepSpeed keeps gradients outside `.grad`; use its own `gradient_clipping`, or FSDP2"
        )
    if isinstance(parameter, DTensor) and any(p.is_partial() for p in parameter.placements):
        raise InputError(f"{name}: a parameter placed as partial sums has no norm; redistribute it first")
