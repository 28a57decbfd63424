"""The tensors of a model that are averaged: trained weights and floating buffers, this process's share of
each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from weightsmith.errors import InputError
from weightsmith.training.names import plain_name
from weightsmith.training.sharded import local


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a model.

    Attributes:
        name: Its name without the prefixes of wrappers.
        tensor: The parameter or buffer itself.
        trained: Whether it has a gradient.
        share: What this process counts of a sum over ranks: 1 over the number of ranks that hold the same
            numbers.
    """

    name: str
    tensor: Tensor
    trained: bool
    share: float

    @property
    def values(self) -> Tensor:
        """This process's numbers, sharing memory with the model."""
        return local(self.tensor.detach())

    def span(self) -> tuple[int, int]:
        """Where this process's numbers lie in the flattened whole tensor: [start, stop).

        Raises:
            InputError: they are not one piece (sharded along another axis than the first).
        """
        if not isinstance(self.tensor, DTensor):
            return 0, self.tensor.numel()
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        placements = self.tensor.placements
        if any(not (isinstance(p, Replicate) or (isinstance(p, Shard) and p.dim == 0)) for p in placements):
            raise InputError(
                f"{self.name} is sharded as {placements}; candidates can be read from folders only where "
                "tensors are sharded along their first axis (FSDP2's way)"
            )
        shape, offset = compute_local_shape_and_global_offset(
            self.tensor.shape, self.tensor.device_mesh, placements
        )
        row = self.tensor[0].numel() if self.tensor.ndim else 1
        start = offset[0] * row if self.tensor.ndim else 0
        count = 1
        for size in shape:
            count *= size
        return start, start + count


def slots_of(model: nn.Module) -> list[Slot]:
    """The slots of a model: trained parameters, tied ones once, and floating buffers that are saved.

    Raises:
        InputError: it has none, or trains weights that are no plain floats.
    """
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if not parameter.is_floating_point() or parameter.numel() == 0:
                raise InputError(
                    f"{plain_name(name)}: {parameter.dtype} of shape {tuple(parameter.shape)} can't be "
                    "averaged; weights must be plain floats, whole or sharded by FSDP2"
                )
            found.append(Slot(plain_name(name), parameter, True, _share(parameter)))
    if not found:
        raise InputError("the model has no trained weights to average")
    for name, buffer in _saved_buffers(model):
        if buffer.is_floating_point():
            found.append(Slot(name, buffer, False, _share(buffer)))
    return found


def as_slots(model: nn.Module | Sequence[Slot]) -> Sequence[Slot]:
    """The slots of a model, or slots as they are: looking them up at each step costs milliseconds."""
    return slots_of(model) if isinstance(model, nn.Module) else model


def integer_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Saved buffers that are counted, not averaged: the last state's are kept."""
    for name, buffer in _saved_buffers(model):
        if not buffer.is_floating_point():
            yield name, buffer


def whole(tensor: Tensor) -> Tensor:
    """All numbers of a tensor, gathered where it is sharded (every rank must ask in the same order)."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def is_sharded(slots: Sequence[Slot]) -> bool:
    """Whether the ranks hold pieces, so that sums run over them."""
    return any(isinstance(slot.tensor, DTensor) for slot in slots)


def ranks() -> tuple[int, int]:
    """(rank, number of ranks) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(vector: Tensor, device: torch.device) -> Tensor:
    """`vector` summed over ranks, the same bits on each of them; fp64 on the CPU."""
    wire = vector.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(wire)
    dist.broadcast(wire, src=0)
    return wire.cpu()


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for holder, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield plain_name(f"{holder}.{key}" if holder else key), buffer


def _share(tensor: Tensor) -> float:
    world = ranks()[1]
    if not isinstance(tensor, DTensor):
        return 1 / world
    copies = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        copies *= size if isinstance(placement, Replicate) else 1
    # Ranks beside the mesh hold the same pieces again.
    return 1 / (copies * max(1, world // tensor.device_mesh.size()))
