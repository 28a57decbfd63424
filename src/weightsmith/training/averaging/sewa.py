"""SeWA on a model: learn the mask, keep the K best candidates, polish. See the package's text for source and
rule.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.averaging.choice import Selection, mean_of
from weightsmith.training.averaging.masks import Mask, learn
from weightsmith.training.averaging.objective import Bank, Loss, Objective, drop_broken, model_loss
from weightsmith.training.averaging.options import SeWAOptions, check_select

log = logging.getLogger(__name__)

NESTED = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Numbers of candidates that `num_select="auto"` compares, and all of them."""


def sewa_select(
    model: nn.Module,
    bank: Bank,
    batches: Iterable[Any],
    loss: Loss = model_loss,
    *,
    num_select: int | Literal["auto"] = 10,
    options: SeWAOptions | None = None,
    held_out_batches: int = 8,
    norm_statistics: str = "recompute",
) -> Selection:
    """Choose the candidates whose uniform mean has a low loss.

    The model has its own weights again when this returns; `bank.mix(selection.weights, model)` gives it the
    mean. Candidates that hold NaN or infinity leave the bank. In a group of ranks all of them call this, each
    with its own batches.

    Args:
        model: Any model of the candidates' tensors; under DDP give `ddp.module`.
        bank: `MemoryBank` or `FolderBank`.
        batches: What the loss is measured on, readable again and again: held-out data for a choice that does
            not overfit.
        loss: Of the model on a batch; the one a Hugging Face model returns by default.
        num_select: K, or auto: learn for 10 and take the K of `NESTED` whose mean has the lowest loss.
        options: How the mask is learned.
        held_out_batches: Batches that polishing and auto measure on.
        norm_statistics: See `AveragingOptions`.

    Raises:
        InputError: fewer (finite) candidates than `num_select`, no data.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> bank = MemoryBank()
        >>> for step, weight in enumerate([0.0, 1.0, 9.0, 3.0]):
        ...     _ = nn.init.constant_(model.weight, weight)
        ...     bank.add(model, step)
        >>> batches = [(torch.ones(1, 1), torch.full((1, 1), 2.0))]  # the best weight is 2
        >>> error = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> sewa_select(model, bank, batches, error, num_select=2).chosen_steps
        (1, 3)
    """
    options = options or SeWAOptions()
    needed = 1 if num_select == "auto" else num_select
    check_select(needed, len(bank))
    if broken := drop_broken(bank, needed):
        log.warning("left out candidates that hold NaN or infinity: steps %s", broken)
    number = len(bank)
    target = max(1, min(10, number // 2)) if num_select == "auto" else num_select
    if target == number:
        return mean_of("sewa", bank.steps, range(number))
    with Objective(model, bank, batches, loss, norm_statistics=norm_statistics) as objective:
        mask = learn(objective.gradient, number, target, options)
        if all(math.isnan(value) for value in mask.history):
            raise InputError(
                "the loss was not finite at any mixture of the candidates: check `batches` and `loss`"
            )
        chosen, losses = mask.top(target), {}
        if num_select == "auto":
            chosen, losses = _nested(objective, mask, number, held_out_batches)
        if options.polish and len(chosen) < number:
            chosen, after = _polish(objective, chosen, number, options.polish, held_out_batches)
            losses |= after
        return mean_of(
            "sewa",
            bank.steps,
            chosen,
            losses=losses,
            scores=mask.probabilities,
            history=mask.history,
            cost=objective.cost,
        )


def _nested(
    objective: Objective, mask: Mask, number: int, batches: int
) -> tuple[list[int], dict[str, float]]:
    """The best of the means of the top 1, 2, 5, ... candidates, and the loss of each."""
    losses = {}
    for size in (*(size for size in NESTED if size < number), number):
        losses[size] = objective.score(_uniform(mask.top(size), number), batches)
    best = min(losses, key=lambda size: (losses[size], -size))
    return mask.top(best), {f"top {size}": value for size, value in losses.items()}


def _polish(
    objective: Objective, chosen: list[int], number: int, swaps: int, batches: int
) -> tuple[list[int], dict[str, float]]:
    """Swap single candidates as the gradient proposes, while the loss falls."""
    best = objective.score(_uniform(chosen, number), batches)
    losses = {"before polish": best}
    for _ in range(swaps):
        # All candidates are looked at, also those of weight 0.
        slopes = objective.slopes(_uniform(chosen, number), batches)
        outside = [index for index in range(number) if index not in chosen]
        leaves = max(chosen, key=lambda index: float(slopes[index]))
        enters = min(outside, key=lambda index: float(slopes[index]))
        trial = sorted([*(index for index in chosen if index != leaves), enters])
        value = objective.score(_uniform(trial, number), batches)
        if not value < best:
            break
        chosen, best = trial, value
    return chosen, {**losses, "after polish": best}


def _uniform(chosen: list[int], number: int) -> Tensor:
    weights = torch.zeros(number, dtype=torch.float64)
    weights[chosen] = 1 / len(chosen)
    return weights
