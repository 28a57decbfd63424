"""Running means of a model during training: SWA (uniform) and EMA (exponential), summed in fp32.

`torch.optim.swa_utils.AveragedModel` does the arithmetic in the parameter's own dtype: over 100 states in
bfloat16 its mean is off by about a sixth of the change that averaging makes. Here the sums are fp32 and cast
once at the end; under FSDP2 each rank keeps its shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.averaging.slots import slots_of


class RunningAverage:
    """The running mean of a model's trained weights and floating buffers.

    Args:
        model: The model in training.
        kind: swa is the mean of all states seen by `update`; ema moves towards each by 1 - `decay`, from the
            first.
        decay: Of ema, in 0 <= decay < 1.

    Attributes:
        model: The model in training.
        num_updates: States seen.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = RunningAverage(model, kind="swa")
        >>> for value in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> with average.applied():
        ...     model.weight.item()
        3.0
        >>> model.weight.item()
        6.0
    """

    def __init__(
        self, model: nn.Module, *, kind: Literal["swa", "ema"] = "ema", decay: float = 0.999
    ) -> None:
        if kind not in ("swa", "ema"):
            raise InputError(f"kind must be swa or ema, got {kind!r}")
        if not 0 <= decay < 1:
            raise InputError(f"decay must be in 0 <= decay < 1, got {decay}")
        self.kind, self.decay, self.num_updates = kind, decay, 0
        self.model = model
        self._slots = slots_of(model)
        self._means: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present state in."""
        if self.num_updates == 0:
            self._means = {slot.name: slot.values.to(torch.float32, copy=True) for slot in self._slots}
        else:
            pull = 1 - self.decay if self.kind == "ema" else 1 / (self.num_updates + 1)
            for slot in self._slots:
                self._means[slot.name].lerp_(slot.values.float(), pull)
        self.num_updates += 1

    @torch.no_grad()
    def load_into_model(self) -> None:
        """Give the model the mean, cast to its own dtypes.

        Raises:
            InputError: there was no update yet.
        """
        if self.num_updates == 0:
            raise InputError("the running mean has seen no state yet")
        for slot in self._slots:
            slot.values.copy_(self._means[slot.name])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the mean inside the block and its own weights after it."""
        kept = [slot.values.clone() for slot in self._slots]
        self.load_into_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for slot, values in zip(self._slots, kept, strict=True):
                    slot.values.copy_(values)

    def state_dict(self) -> dict[str, Any]:
        """Means (this process's shards) and count; `load_state_dict` gives the same bits back."""
        return {"num_updates": self.num_updates, "means": self._means}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: its tensors are not the model's.
        """
        means = state["means"]
        for slot in self._slots:
            if state["num_updates"] and (
                slot.name not in means or means[slot.name].shape != slot.values.shape
            ):
                found = tuple(means[slot.name].shape) if slot.name in means else "nothing"
                raise InputError(f"{slot.name} is {tuple(slot.values.shape)}, the saved mean has {found}")
        self.num_updates = int(state["num_updates"])
        self._means = {
            slot.name: means[slot.name].to(slot.values.device, torch.float32, copy=True)
            for slot in self._slots
            if self.num_updates
        }
