"""Candidates in checkpoint folders, read tile by tile: no more than one tile of them is ever in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import CheckpointError, InputError
from weightsmith.tensors.floats import FLOAT_DTYPES
from weightsmith.training.averaging.bank import MemoryBank
from weightsmith.training.averaging.candidates import open_candidates, run_folders
from weightsmith.training.averaging.slots import (
    Slot,
    as_slots,
    integer_buffers,
    is_sharded,
    slots_of,
    sum_over_ranks,
)
from weightsmith.training.sharded import local_gradient

TILE_ELEMENTS = 1 << 20


class FolderBank:
    """States of a run in checkpoint folders, oldest first; the same methods as `MemoryBank`, without `add`.

    Args:
        folders: Checkpoint folders, or opened checkpoints.
        steps: Training step of each; the number at the end of each folder's name when left out.

    Attributes:
        steps: Training step of each, ascending.
        checkpoints: The candidates.

    Raises:
        CheckpointError: a folder can't be read, or the candidates are not states of one model.
    """

    def __init__(
        self, folders: Sequence[str | Path | Checkpoint], steps: Sequence[int] | None = None
    ) -> None:
        self.checkpoints, self.steps = open_candidates(folders, steps)

    @classmethod
    def from_run(cls, folder: str | Path, pattern: str = "checkpoint-*") -> Self:
        """The checkpoints of a Trainer's output folder, in the order of their steps.

        Raises:
            InputError: none is there.
        """
        return cls(run_folders(folder, pattern))

    def __len__(self) -> int:
        return len(self.checkpoints)

    @torch.no_grad()
    def mix(self, weights: Sequence[float] | Tensor, model: nn.Module | Sequence[Slot]) -> None:
        """As `MemoryBank.mix`; candidates of weight 0 are not read."""
        numbers = self._weights(weights)
        for slot in as_slots(model):
            target, (first, last) = slot.values.reshape(-1), self._span(slot)
            for start in range(first, last, TILE_ELEMENTS):
                stop = min(start + TILE_ELEMENTS, last)
                total = torch.zeros(stop - start)
                for index, values in self._tiles(slot.name, start, stop, numbers):
                    total.add_(values, alpha=numbers[index])
                target[start - first : stop - first].copy_(total)
        for name, buffer in integer_buffers(model) if isinstance(model, nn.Module) else ():
            if name in self.checkpoints[-1].tensors:
                values = torch.from_numpy(self.checkpoints[-1].read(name))
                buffer.copy_(values.view(buffer.dtype).reshape(buffer.shape))

    @torch.no_grad()
    def dots(
        self, model: nn.Module | Sequence[Slot], weights: Sequence[float] | Tensor | None = None
    ) -> Tensor:
        """As `MemoryBank.dots`."""
        slots = as_slots(model)
        sharded = is_sharded(slots)
        numbers = self._weights([1.0] * len(self) if weights is None else weights)
        total = torch.zeros(len(self), dtype=torch.float64)
        for slot in slots:
            gradient = local_gradient(slot.tensor, slot.name) if slot.trained else None
            if gradient is None:
                continue
            flat = gradient.reshape(-1).to("cpu", torch.float32)
            first, last = self._span(slot)
            for start in range(first, last, TILE_ELEMENTS):
                stop = min(start + TILE_ELEMENTS, last)
                piece = flat[start - first : stop - first]
                for index, values in self._tiles(slot.name, start, stop, numbers):
                    total[index] += torch.dot(piece, values).double() * (slot.share if sharded else 1.0)
        return sum_over_ranks(total, slots[0].values.device) if sharded else total

    def finite(self) -> list[bool]:
        """Whether each candidate holds finite numbers only: reads all of them once."""
        return [all(_finite(checkpoint, name) for name in self._floats()) for checkpoint in self.checkpoints]

    def keep(self, indices: Sequence[int]) -> None:
        """Forget all candidates but those at `indices`; their folders stay."""
        self.checkpoints = [self.checkpoints[index] for index in indices]
        self.steps = tuple(self.steps[index] for index in indices)

    def in_memory(self, model: nn.Module, *, storage: torch.dtype = torch.float32) -> MemoryBank:
        """The same candidates in memory, this process's share of each: what repeated reading costs is
        saved.
        """
        bank = MemoryBank(len(self), storage=storage)
        slots = slots_of(model)
        for index, step in enumerate(self.steps):
            one = [1.0 if other == index else 0.0 for other in range(len(self))]
            state = {}
            for slot in slots:
                first, last = self._span(slot)
                (_, values), *_ = self._tiles(slot.name, first, last, one, fresh=True)
                state[slot.name] = values
            bank.put(state, step)
        return bank

    def close(self) -> None:
        """Close the candidates' files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()

    def _tiles(
        self, name: str, start: int, stop: int, numbers: Sequence[float], *, fresh: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, values) of the candidates with a weight; one buffer for all of them unless `fresh`."""
        buffer = np.empty(stop - start, np.float32)
        for index, checkpoint in enumerate(self.checkpoints):
            if numbers[index] != 0:
                values = np.empty(stop - start, np.float32) if fresh else buffer
                yield index, torch.from_numpy(checkpoint.read(name, start, stop, values))

    def _span(self, slot: Slot) -> tuple[int, int]:
        info = self.checkpoints[-1].tensors.get(slot.name)
        if info is None or info.dtype not in FLOAT_DTYPES or info.shape != tuple(slot.tensor.shape):
            found = f"{info.dtype} {list(info.shape)}" if info is not None else "no such tensor"
            raise CheckpointError(
                f"{slot.name} of the model is {list(slot.tensor.shape)}; {self.checkpoints[-1].name} has "
                f"{found}. Candidates must be of this model, with tensors named as in memory"
            )
        return slot.span()

    def _weights(self, weights: Sequence[float] | Tensor) -> list[float]:
        numbers = [float(weight) for weight in weights]
        if len(numbers) != len(self):
            raise InputError(f"expected one weight for each of {len(self)} states, got {len(numbers)}")
        return numbers

    def _floats(self) -> list[str]:
        return [name for name, info in self.checkpoints[-1].tensors.items() if info.dtype in FLOAT_DTYPES]


def _finite(checkpoint: Checkpoint, name: str) -> bool:
    numel = checkpoint.tensors[name].numel
    return all(
        bool(np.isfinite(checkpoint.read(name, start, min(start + TILE_ELEMENTS, numel))).all())
        for start in range(0, numel, TILE_ELEMENTS)
    )
