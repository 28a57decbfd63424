"""Choices that measure losses of whole candidates: the best K alone, and the greedy soup."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.averaging.choice import Selection, by_rule, mean_of
from weightsmith.training.averaging.objective import Bank, Loss, Objective, drop_broken, model_loss
from weightsmith.training.averaging.options import LEARNED, AveragingOptions, check_select
from weightsmith.training.averaging.sewa import sewa_select

log = logging.getLogger(__name__)


def select(
    options: AveragingOptions,
    bank: Bank,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss = model_loss,
) -> Selection:
    """The candidates that `options.method` chooses from a bank.

    Args:
        options: `method` and what belongs to it.
        bank: Candidates.
        model: Of the candidates' tensors; for methods that measure a loss.
        batches: What they measure it on.
        loss: Of the model on a batch.

    Raises:
        InputError: too few candidates, or no model or data where one is needed.
    """
    if options.method not in LEARNED:
        return by_rule(options, bank.steps)
    if model is None or batches is None:
        raise InputError(f"{options.method} needs a model and data to measure a loss on")
    if options.method == "sewa":
        return sewa_select(
            model,
            bank,
            batches,
            loss,
            num_select=options.num_select,
            options=options.sewa,
            held_out_batches=options.batches,
            norm_statistics=options.norm_statistics,
        )
    needed = options.num_select if options.method == "best" and options.num_select != "auto" else 1
    check_select(needed, len(bank))
    if broken := drop_broken(bank, needed):
        log.warning("left out candidates that hold NaN or infinity: steps %s", broken)
    with Objective(model, bank, batches, loss, norm_statistics=options.norm_statistics) as objective:
        alone = [objective.score(_one(index, len(bank)), options.batches) for index in range(len(bank))]
        # Of equal ones the later; a loss that is no number comes last.
        order = sorted(range(len(bank)), key=lambda index: (math.isnan(alone[index]), alone[index], -index))
        if options.method == "best":
            return mean_of("best", bank.steps, order[:needed], scores=tuple(alone), cost=objective.cost)
        return _greedy(objective, bank, order, alone, options.batches)


def _greedy(
    objective: Objective, bank: Bank, order: list[int], alone: list[float], batches: int
) -> Selection:
    """Candidates from the best down, each kept when the mean with it is at least as good (Wortsman et al.,
    recipe 1).
    """
    chosen, best = [order[0]], alone[order[0]]
    for index in order[1:]:
        trial = torch.zeros(len(bank), dtype=torch.float64)
        trial[[*chosen, index]] = 1 / (len(chosen) + 1)
        value = objective.score(trial, batches)
        if value <= best:
            chosen, best = [*chosen, index], value
    losses = {"best alone": alone[order[0]], "soup": best}
    return mean_of("greedy", bank.steps, chosen, losses=losses, scores=tuple(alone), cost=objective.cost)


def _one(index: int, number: int) -> Tensor:
    weights = torch.zeros(number, dtype=torch.float64)
    weights[index] = 1.0
    return weights
