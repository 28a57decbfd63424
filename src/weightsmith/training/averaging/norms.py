"""Running statistics of batch normalisation for a model whose weights were averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightsmith.training.averaging.objective import Loss, model_loss, to_device


def has_norm_statistics(model: nn.Module) -> bool:
    """Whether the model keeps running statistics that belong to its weights."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def update_norms(model: nn.Module, batches: Iterable[Any], loss: Loss = model_loss) -> None:
    """Make the running statistics of batch normalisation anew: one pass over `batches`, each counting the
    same.

    Args:
        model: Left in the mode it was in.
        batches: Training data.
        loss: Runs the model on a batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [module.momentum for module in norms]
    was = model.training
    model.train()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # a plain mean over batches
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            loss(model, to_device(batch, device))
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    model.train(was)
