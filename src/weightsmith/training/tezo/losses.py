"""The two losses of a probe: what a closure returns, and what all processes make of theirs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from weightsmith.errors import InputError

NEEDS_CLOSURE = "needs a closure that returns the loss without calling backward()"


class ZerothOrderStats(NamedTuple):
    """The last step.

    Attributes:
        loss: Mean of the two probes' losses, over all processes.
        kappa: Derivative along the direction, before it is clipped, with the first group's rho.
        skipped: Whether the step was not taken because a loss was not finite.
    """

    loss: float = math.nan
    kappa: float = math.nan
    skipped: bool = False


def loss_of(closure: Callable[[], Any], name: str, tell: Callable[[str, str], None]) -> Tensor | float:
    """The loss that a closure returns: a float, or 0-d and float64, still on its device.

    Args:
        closure: Runs forward.
        name: The optimiser's, for messages.
        tell: Takes the kind and the words of a warning.

    Raises:
        InputError: it calls backward(), or its loss is no number.
    """
    try:
        loss = closure()
    except RuntimeError as wrong:
        if "does not require grad" not in str(wrong):
            raise
        raise InputError(f"{name} {NEEDS_CLOSURE}") from wrong
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise InputError(f"{name}: the closure's loss must be one number, got shape {tuple(loss.shape)}")
        if loss.requires_grad:
            tell("graph", "the closure builds a graph for gradients that nothing uses")
        return loss.detach().double() if loss.device.type != "mps" else loss.detach()
    if isinstance(loss, np.ndarray) and loss.ndim == 0:
        loss = loss.item()
    if isinstance(loss, bool) or not isinstance(loss, numbers.Real):
        raise InputError(
            f"{name}: the closure must return its loss, a number or a tensor with one; got "
            f"{type(loss).__name__}"
        )
    return float(loss)


def agreed(
    sums: Sequence[float], mark: float, group: Any, device: torch.device, name: str
) -> tuple[float, float]:
    """Difference of the probes and loss over all processes, the same bits on each.

    Args:
        sums: Weighted difference, weighted loss and weight of this process.
        mark: Stands for what processes must have in common; a whole number that float64 holds.
        group: The processes; "auto" takes all, where torch.distributed runs, None this one alone.
        device: Of the weights, where the processes' backend needs numbers there.
        name: The optimiser's, for messages.

    Raises:
        InputError: the processes' marks differ.
    """
    if isinstance(group, str):
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    rows = [[*sums, mark]]
    if group is not None and dist.get_world_size(group) > 1:
        on = device if "nccl" in dist.get_backend(group) else torch.device("cpu")
        mine = torch.tensor(rows[0], dtype=torch.float64, device=on)
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(others, mine, group=group)
        rows = torch.stack(others).tolist()
    if len({row[3] for row in rows}) > 1:
        raise InputError(
            f"{name}: processes differ in method, options, rates, step or parameters; nothing was changed"
        )
    # Every process adds the same numbers in the same order.
    difference, loss, weight = (sum(row[place] for row in rows) for place in range(3))
    return difference / weight, loss / weight
