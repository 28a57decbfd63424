"""Weights that stay 0 while the others are trained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weightsmith.errors import InputError


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values that are kept; 0, never -0, elsewhere."""
    return torch.where(mask, values, values.new_zeros(()))


class FrozenMask:
    """Masks that a model's weights keep while they are trained; made by `frozen`.

    Gradients of pruned weights are 0, on whatever device the model is trained and whether or not a parameter
    was frozen when the masks were given. So optimisers that begin after that and step along gradients leave
    these weights at 0, with weight decay and momentum. One that was in use before has momentum that moves
    them; given to `frozen`, it has them set to 0 after each of its steps. What moves weights otherwise
    (a merged adapter, a method without gradients) is put right by `remask_`.

    Parameters that take the place of these (of a copy of the model, or after `model.to` a device for which
    torch makes new ones, as XLA) have the zeros, and nothing that keeps them.

    Attributes:
        masks: bool by parameter's name, each on the device where it was last used.
    """

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.masks = masks
        self._model = model
        self._handles: list[RemovableHandle] = []
        parameters = dict(model.named_parameters())
        for name in masks:
            parameter, trained = parameters[name], parameters[name].requires_grad
            parameter.requires_grad_(True)  # without which torch takes no hook; it stays when this is undone
            self._handles.append(parameter.register_hook(partial(self._masked, name)))
            parameter.requires_grad_(trained)
        if optimizer is not None:
            chosen = {name: parameters[name] for name in masks}

            @torch.no_grad()
            def after(*_: Any) -> None:
                for name, parameter in chosen.items():
                    parameter.copy_(self._masked(name, parameter))

            self._handles.append(optimizer.register_step_post_hook(after))

    def _masked(self, name: str, values: Tensor) -> Tensor:
        """The values under the mask of a parameter, which follows them to their device."""
        if self.masks[name].device != values.device:
            self.masks[name] = self.masks[name].to(values.device)
        return masked(values, self.masks[name])

    @torch.no_grad()
    def remask_(self, model: nn.Module | None = None) -> int:
        """Set pruned weights to 0 again.

        Args:
            model: One with the same parameter names, such as PEFT's `merge_and_unload()` gives; by default
                the one that was frozen.

        Returns:
            How many of them were not 0.

        Raises:
            InputError: the model has no such parameter.
        """
        parameters = dict((model or self._model).named_parameters())
        moved = 0
        for name, mask in self.masks.items():
            if name not in parameters:
                raise InputError(f"{name}: the model has no such parameter; call merge_and_unload() first")
            weight = parameters[name]
            mask = mask.to(weight.device)
            moved += int((weight.ne(0) & ~mask).sum())
            weight.copy_(masked(weight, mask))
        return moved

    def remove(self) -> None:
        """Let gradients through again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def frozen(
    model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> FrozenMask:
    """Set weights to 0 where masks are false, and keep them there.

    Args:
        model: With these parameters.
        masks: By parameter's name, of its shape.
        optimizer: One that was in use before; pruned weights are set to 0 after each of its steps.

    Raises:
        InputError: masks of parameters that the model doesn't have, or of another shape.
    """
    parameters = dict(model.named_parameters())
    found = {}
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            there = list(parameters[name].shape) if name in parameters else "no such parameter"
            raise InputError(f"{name}: mask of {list(mask.shape)}, the model has {there}")
        found[name] = mask.to(parameters[name].device, torch.bool)
    made = FrozenMask(model, found, optimizer)
    made.remask_()
    return made
