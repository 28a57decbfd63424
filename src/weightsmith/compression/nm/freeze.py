"""Later training of a pruned model that keeps its zeros."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weightsmith.compression.nm.masked import masked
from weightsmith.compression.nm.oneshot import Mask
from weightsmith.compression.nm.options import NMOptions
from weightsmith.compression.nm.targets import find_targets
from weightsmith.errors import InputError


class FrozenMask:
    """Masks that a model's weights keep while they are trained; made by `freeze_mask_`.

    Gradients of pruned weights are 0, on whatever device the model is trained and whether or not a parameter
    was frozen when the masks were given. So optimisers that begin after that and step along gradients leave
    these weights at 0, with weight decay and momentum. One that was in use before has momentum that moves
    them; given to `freeze_mask_`, it has them set to 0 after each of its steps. What moves weights otherwise
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


def freeze_mask_(
    model: nn.Module,
    masks: Mapping[str, Mask | Tensor] | None = None,
    options: NMOptions | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> FrozenMask:
    """Keep a pruned model's zeros in later training.

    Call it before the optimiser is made, or give the optimiser as well: momentum of steps before the pruning
    would go on to move pruned weights.

    Args:
        model: Pruned; its weights are set to 0 where the masks are false.
        masks: By parameter's name, as `prune_`, `MaskProPruner.masks` or `read_masks` give; by default where
            weights are not 0, of the linear layers.
        options: Which layers, where no masks are given.
        optimizer: One that was in use before; pruned weights are set to 0 after each of its steps.

    Raises:
        InputError: masks of parameters that the model doesn't have, or of another shape; no masks, and a
            model without zeros.
    """
    if masks is None:
        found = {t.name: t.parameter.detach() != 0 for t in find_targets(model, options or NMOptions())}
        if all(bool(mask.all()) for mask in found.values()):
            raise InputError("freeze_mask_: no linear layer has a weight that is 0; prune the model first")
    else:
        parameters = dict(model.named_parameters())
        found = {}
        for name, given in masks.items():
            kept = given.kept if isinstance(given, Mask) else given
            if name not in parameters or parameters[name].shape != kept.shape:
                there = list(parameters[name].shape) if name in parameters else "no such parameter"
                raise InputError(f"{name}: mask of {list(kept.shape)}, the model has {there}")
            found[name] = kept.to(parameters[name].device, torch.bool)
    frozen = FrozenMask(model, found, optimizer)
    frozen.remask_()
    return frozen
