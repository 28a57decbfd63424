"""The loss of a mixture of candidates on a model, and its gradient's dot product with each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm

from weightsmith.errors import InputError
from weightsmith.training.averaging.slots import Slot, ranks, slots_of, sum_over_ranks

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


class Bank(Protocol):
    """Candidates: `MemoryBank` or `FolderBank`."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Training step of each candidate, oldest first."""

    def __len__(self) -> int: ...

    def mix(self, weights: Sequence[float] | Tensor, model: nn.Module | Sequence[Slot]) -> None:
        """Set a model's tensors to the weighted sum."""

    def dots(
        self, model: nn.Module | Sequence[Slot], weights: Sequence[float] | Tensor | None = None
    ) -> Tensor:
        """Gradient's dot product with each candidate."""

    def finite(self) -> list[bool]:
        """Whether each candidate holds finite numbers only."""

    def keep(self, indices: Sequence[int]) -> None:
        """Forget the others."""


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a Hugging Face model returns for a batch with labels."""
    return model(**batch).loss


class Objective:
    """Losses of mixtures; a context manager that gives the model its own weights back at the end.

    The model runs in eval mode. Layers of batch normalisation use the statistics of each batch (`recompute`:
    they will be made anew in the end), or those of the mixture (`average`).

    Args:
        model: Unwrapped, or sharded by FSDP2; under DDP give `ddp.module`.
        bank: Candidates.
        batches: Read again and again; each rank its own.
        loss: Of the model on a batch.
        norm_statistics: See above.

    Attributes:
        cost: Passes and reads so far.

    Raises:
        InputError: `batches` is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        batches: Iterable[Any],
        loss: Loss = model_loss,
        *,
        norm_statistics: str = "recompute",
    ) -> None:
        self.model, self.bank, self.batches, self.loss = model, bank, batches, loss
        self.cost = {"forward": 0, "backward": 0, "reads": 0}
        self._norm_statistics = norm_statistics
        self._slots = slots_of(model)
        self._device = self._slots[0].values.device
        self._world = ranks()[1]
        if iter(batches) is iter(batches):
            raise InputError("`batches` must be readable more than once: give a list or a DataLoader")
        self._stream = self._endless()
        self._scored: list[Any] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Objective:
        self._undo = contextlib.ExitStack()
        kept = [slot.values.clone() for slot in self._slots]
        gradients = [slot.tensor.grad for slot in self._slots]
        self._undo.callback(self._give_back, kept, gradients)
        for module in self.model.modules():
            self._undo.callback(setattr, module, "training", module.training)
            module.training = False
            if isinstance(module, _BatchNorm) and self._norm_statistics == "recompute":
                self._undo.callback(setattr, module, "track_running_stats", module.track_running_stats)
                module.training, module.track_running_stats = True, False
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()

    def gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        """Loss at a mixture on the next batch, and the gradient's dot product with each candidate of a
        weight.

        Under several ranks the mean over their batches, the same bits on each.
        """
        self._load(weights)
        for slot in self._slots:
            slot.tensor.grad = None
        with torch.enable_grad():
            loss = self._evaluate(next(self._stream))
            loss.backward()
        self.cost["backward"] += 1
        self.cost["reads"] += int((weights != 0).sum())
        dots = self.bank.dots(self._slots, weights)
        if self._world == 1:
            return float(loss.detach()), dots
        # Sharded gradients are means over ranks already, and `dots` has summed their pieces.
        own = dots / self._world
        reduced = sum_over_ranks(
            torch.cat([own, loss.detach().double().cpu()[None] / self._world]), self._device
        )
        return float(reduced[-1]), reduced[:-1]

    def slopes(self, weights: Tensor, batches: int) -> Tensor:
        """Mean over the batches of `score` of the gradient's dot product with every candidate, fp64 (N,)."""
        self._load(weights)
        for slot in self._slots:
            slot.tensor.grad = None
        for batch in self._score_batches(batches):
            with torch.enable_grad():
                (self._evaluate(batch) / batches).backward()
            self.cost["backward"] += 1
        self.cost["reads"] += len(self.bank)
        dots = self.bank.dots(self._slots)
        return dots if self._world == 1 else sum_over_ranks(dots / self._world, self._device)

    @torch.no_grad()
    def score(self, weights: Sequence[float] | Tensor, batches: int) -> float:
        """Mean loss at a mixture over the first `batches` batches; the same ones every time."""
        self._load(torch.as_tensor(weights, dtype=torch.float64))
        losses = [self._evaluate(batch).double().cpu() for batch in self._score_batches(batches)]
        if not losses:
            raise InputError("there is no data to measure a loss on: `batches` is empty")
        total = torch.stack(
            [torch.stack(losses).sum(), torch.tensor(float(len(losses)), dtype=torch.float64)]
        )
        if self._world > 1:
            total = sum_over_ranks(total, self._device)
        return float(total[0] / total[1])

    def _score_batches(self, number: int) -> list[Any]:
        if len(self._scored) < number:  # kept, since a loader may shuffle
            self._scored = list(islice(iter(self.batches), number))
        return self._scored[:number]

    def _load(self, weights: Tensor) -> None:
        for module in self.model.modules():
            # A root left gathered after a forward pass would not see what changes in its shards.
            if isinstance(module, FSDPModule):
                module.reshard()
        self.bank.mix(weights, self._slots)
        self.cost["reads"] += int((weights != 0).sum())

    def _evaluate(self, batch: Any) -> Tensor:
        self.cost["forward"] += 1
        loss = self.loss(self.model, to_device(batch, self._device))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError(f"the loss must be one number in a tensor, got {type(loss).__name__}")
        return loss

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.batches:
                empty = False
                yield batch
            if empty:
                raise InputError("there is no data to measure a loss on: `batches` is empty")

    def _give_back(self, kept: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            for slot, values, gradient in zip(self._slots, kept, gradients, strict=True):
                slot.values.copy_(values)
                slot.tensor.grad = gradient


def drop_broken(bank: Bank, needed: int) -> list[int]:
    """Take candidates with NaN or infinity out of the bank; returns their steps, the same on every rank.

    Raises:
        InputError: fewer than `needed` remain.
    """
    good = torch.tensor([float(finite) for finite in bank.finite()], dtype=torch.float64)
    if ranks()[1] > 1:
        wire = good.to("cuda") if dist.get_backend() == "nccl" else good
        dist.all_reduce(wire, op=dist.ReduceOp.MIN)
        good = wire.cpu()
    broken = [bank.steps[index] for index in range(len(good)) if not good[index]]
    if broken:
        if len(bank) - len(broken) < needed:
            raise InputError(
                f"{len(broken)} of {len(bank)} candidates hold NaN or infinity (steps {broken[:8]}); "
                f"{needed} are needed"
            )
        bank.keep([index for index in range(len(good)) if good[index]])
    return broken


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors in a batch on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return (
            type(batch)(to_device(value, device) for value in batch)
            if type(batch) in (list, tuple)
            else batch
        )
    return batch
