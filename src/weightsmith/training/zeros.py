"""A pruned model in the Hugging Face Trainer: its zeros stay, whatever trains it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from weightsmith.checkpoints.masks import stored_masks
from weightsmith.tensors.zeros import frozen, masked


class KeepZeros(TrainerCallback):
    """Freeze the masks of a model for a training; made before an adapter is put on it.

    Gradients of pruned weights are 0. Optimisers without gradients move them all the same, so they are set
    to 0 after each step; an adapter that was merged has filled them, so they are at the end. Stands behind
    every callback that changes weights when training ends.

    Args:
        model: Pruned.
        source: Folder or file with its masks.

    Raises:
        CheckpointError: there are none, or they are damaged.
        InputError: masks of parameters that the model doesn't have, or of another shape.
    """

    def __init__(self, model: nn.Module, source: str | Path) -> None:
        masks = {name: torch.from_numpy(mask.kept) for name, mask in stored_masks(source).items()}
        self._frozen = frozen(model, masks)
        self._parameters = [model.get_parameter(name) for name in masks]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zeros again. Under an adapter the weights don't move, and may not be those of the model."""
        for parameter, mask in zip(self._parameters, self._frozen.masks.values(), strict=True):
            if parameter.requires_grad:
                parameter.copy_(masked(parameter, mask))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zeros in what is kept of the training."""
        moved = self._frozen.remask_()
        self._frozen.remove()
        if moved:
            total = sum(int((~mask).sum()) for mask in self._frozen.masks.values())
            warnings.warn(
                f"{moved:,} of {total:,} pruned weights were no longer 0 after the training, as a merged "
                "adapter makes them, and are again: part of what it learnt is gone",
                stacklevel=2,
            )
