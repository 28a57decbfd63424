"""Later training of a pruned model that keeps its zeros."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weightsmith.compression.nm.oneshot import Mask
from weightsmith.compression.nm.options import NMOptions
from weightsmith.compression.nm.targets import find_targets
from weightsmith.errors import InputError
from weightsmith.tensors.zeros import FrozenMask, frozen


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
        found = {name: given.kept if isinstance(given, Mask) else given for name, given in masks.items()}
    return frozen(model, found, optimizer)
