"""Candidates in memory: a ring of the latest states of a model.

Layout   One matrix (candidates, elements) a tensor, so that a mixture is one matrix-vector product and all
         dot products with a gradient are another: both run at the speed of memory. Every rank keeps its own
         shard.
Storage  fp32, or differences from the first candidate in bfloat16: half the memory, and the relative error of
         the mean is 2^-9 of the difference instead of 2^-9 of the weight.
Skipping Candidates of weight 0 are not read: the products run over runs of neighbours that count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.averaging.slots import (
    Slot,
    as_slots,
    integer_buffers,
    is_sharded,
    slots_of,
    sum_over_ranks,
)
from weightsmith.training.sharded import local_gradient

BLOCK_ELEMENTS = 1 << 14
"""Columns of bfloat16 that are widened at once."""


class MemoryBank:
    """The latest `max_size` states that were added, oldest first.

    Args:
        max_size: States kept; the oldest makes room.
        storage: float32, or bfloat16 for differences from the first state.
        device: Where they are kept; the CPU by default, whose memory is larger.

    Attributes:
        steps: Training step of each state, oldest first.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> bank = MemoryBank(max_size=3)
        >>> for step in range(5):
        ...     bank.add(model, step)
        >>> bank.steps
        (2, 3, 4)
    """

    def __init__(
        self,
        max_size: int = 100,
        *,
        storage: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_size < 1:
            raise InputError(f"max_size must be at least 1, got {max_size}")
        if storage not in (torch.float32, torch.bfloat16):
            raise InputError(f"storage must be torch.float32 or torch.bfloat16, got {storage}")
        self.max_size = max_size
        self._storage = storage
        self._device = torch.device(device)
        self._values: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}
        self._integers: dict[str, Tensor] = {}
        # Row of each state, oldest first, and its step.
        self._rows: list[int] = []
        self._steps: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def steps(self) -> tuple[int, ...]:
        """Training step of each state, oldest first."""
        return tuple(self._steps)

    @torch.no_grad()
    def add(self, model: nn.Module, step: int) -> None:
        """Copy a model's state; what happens to the model afterwards changes nothing here.

        Raises:
            InputError: its tensors are not those of the states before; names the first that differs.
        """
        slots = slots_of(model)
        self._check(slots, f"step {step}")
        self.put({slot.name: slot.values for slot in slots}, step)
        self._integers = {name: buffer.detach().clone() for name, buffer in integer_buffers(model)}

    @torch.no_grad()
    def put(self, state: Mapping[str, Tensor], step: int) -> None:
        """Copy the tensors of a state, this process's share of each."""
        full = len(self._rows) == self.max_size
        row = self._rows.pop(0) if full else next(r for r in range(self.max_size) if r not in self._rows)
        if full:
            self._steps.pop(0)
        for name, values in state.items():
            flat = values.reshape(-1)
            if name not in self._values:
                shape = (self.max_size, flat.numel())
                self._values[name] = torch.empty(shape, dtype=self._storage, device=self._device)
                if self._storage != torch.float32:
                    self._reference[name] = flat.to(self._device, torch.float32, copy=True)
            if self._storage == torch.float32:
                self._values[name][row].copy_(flat)
            else:
                self._values[name][row].copy_(flat.to(self._device, torch.float32) - self._reference[name])
        self._rows.append(row)
        self._steps.append(step)

    @torch.no_grad()
    def mix(self, weights: Sequence[float] | Tensor, model: nn.Module | Sequence[Slot]) -> None:
        """Set a model's weights and floating buffers to `sum_i weights[i] * state_i`, summed in fp32.

        Args:
            weights: One for each state, oldest first.
            model: Of the same tensors (or its slots); integer buffers of a model become those of the latest
                state.

        Raises:
            InputError: another number of weights, or other tensors.
        """
        slots = as_slots(model)
        self._check(slots, "the model")
        by_row = self._by_row(weights)
        for slot in slots:
            self._mix_into(slot.values, slot.name, by_row)
        for name, buffer in integer_buffers(model) if isinstance(model, nn.Module) else ():
            if name in self._integers:
                buffer.copy_(self._integers[name])

    @torch.no_grad()
    def dots(
        self, model: nn.Module | Sequence[Slot], weights: Sequence[float] | Tensor | None = None
    ) -> Tensor:
        """Dot product of a model's gradient with each state, over all tensors and all ranks.

        Args:
            model: Its parameters carry gradients.
            weights: Where given, states of weight 0 are not looked at and get 0.

        Returns:
            fp64 (N,), oldest first, on the CPU.
        """
        slots = as_slots(model)
        self._check(slots, "the model")
        looked = self._by_row(torch.ones(len(self)) if weights is None else weights) != 0
        sharded = is_sharded(slots)
        total = torch.zeros(self.max_size, dtype=torch.float64)
        for slot in slots:
            gradient = local_gradient(slot.tensor, slot.name) if slot.trained else None
            if gradient is None:
                continue
            flat = gradient.reshape(-1).to(self._device, torch.float32)
            total += self._products(slot.name, flat, looked) * (slot.share if sharded else 1.0)
        found = total[self._rows]
        return sum_over_ranks(found, slots[0].values.device) if sharded else found

    @torch.no_grad()
    def finite(self) -> list[bool]:
        """Whether each state holds finite numbers only, in this process's share."""
        return [
            all(bool(torch.isfinite(values[row]).all()) for values in self._values.values())
            for row in self._rows
        ]

    def keep(self, indices: Sequence[int]) -> None:
        """Forget all states but those at `indices` (oldest first)."""
        self._rows = [self._rows[index] for index in indices]
        self._steps = [self._steps[index] for index in indices]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and steps, to save a run with; `load_state_dict` gives the same bits back."""
        return {
            "steps": list(self._steps),
            "rows": list(self._rows),
            "values": self._values,
            "reference": self._reference,
            "integers": self._integers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._steps, self._rows = list(state["steps"]), list(state["rows"])
        self._values = {name: values.to(self._device, copy=True) for name, values in state["values"].items()}
        self._reference = {
            name: values.to(self._device, copy=True) for name, values in state["reference"].items()
        }
        self._integers = {name: values.clone() for name, values in state["integers"].items()}

    def _by_row(self, weights: Sequence[float] | Tensor) -> Tensor:
        """`weights` in the order of rows, fp32 on the bank's device."""
        given = torch.as_tensor(weights, dtype=torch.float32)
        if given.shape != (len(self),):
            raise InputError(f"expected one weight for each of {len(self)} states, got {tuple(given.shape)}")
        by_row = torch.zeros(self.max_size)
        by_row[self._rows] = given.cpu()
        return by_row.to(self._device)

    def _mix_into(self, target: Tensor, name: str, by_row: Tensor) -> None:
        """Set `target` to the mixture of `name`, without a buffer where the sum can be formed in place."""
        values = self._values[name]
        direct = target.dtype == torch.float32 and target.device == values.device and target.is_contiguous()
        total = target.view(-1) if direct else torch.empty(values.shape[1], device=self._device)
        if name in self._reference:
            torch.mul(self._reference[name], float(by_row.sum()), out=total)
        else:
            total.zero_()
        for first, last in _runs(by_row != 0):
            self._add_product(values[first:last].mT, by_row[first:last], total)
        if not direct:
            target.copy_(total.view(target.shape))

    def _products(self, name: str, flat: Tensor, looked: Tensor) -> Tensor:
        """fp64 (rows,): dot product of `flat` with each row of `name` that is looked at."""
        values = self._values[name]
        found = torch.zeros(self.max_size, device=self._device)
        for first, last in _runs(looked):
            self._add_product(values[first:last], flat, found[first:last])
        if name in self._reference:
            found += looked * torch.dot(flat, self._reference[name])
        return found.double().cpu()

    def _add_product(self, matrix: Tensor, vector: Tensor, total: Tensor) -> None:
        """Total += matrix @ vector with fp32 sums."""
        if matrix.dtype == torch.float32:
            total.addmv_(matrix, vector)
            return
        # Widened a block at a time: a product in bfloat16 would round its sums.
        tall = matrix.shape[0] == total.shape[0] and matrix.stride(0) == 1
        length = matrix.shape[0 if tall else 1]
        for start in range(0, length, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, length)
            if tall:
                total[start:stop].addmv_(matrix[start:stop].float(), vector)
            else:
                total.addmv_(matrix[:, start:stop].float(), vector[start:stop])

    def _check(self, slots: Sequence[Slot], what: str) -> None:
        if not self._values:
            return
        latest = f"step {self._steps[-1]}" if self._steps else "the bank"
        names = {slot.name: slot.values.numel() for slot in slots}
        for name, values in self._values.items():
            if names.get(name) != values.shape[1]:
                found = f"has {names[name]} elements" if name in names else "is missing"
                raise InputError(f"{name} {found} in {what}; {latest} has {values.shape[1]} elements of it")
        for name in names:
            if name not in self._values:
                raise InputError(f"{name} of {what} is not among the tensors of {latest}")


def _runs(marked: Tensor) -> list[tuple[int, int]]:
    """The [first, last) of neighbours that are marked."""
    flags = [False, *marked.tolist(), False]
    edges = [index for index in range(len(flags) - 1) if flags[index] != flags[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
