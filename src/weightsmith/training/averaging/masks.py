"""SeWA's mask on vectors: projection, relaxed draws, the gradient through a mixture, learning.

The model is behind a function that takes the weights of a mixture and returns the loss and its dot product
with every candidate; everything here has N numbers. fp64 on the CPU, so that every rank computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.training.averaging.options import SeWAOptions

EDGE = 1e-4
"""Probabilities are kept this far from 0 and 1 when they become logits."""
SKIP = 1e-4
"""Entries of a relaxed mask below this are left out of the mixture."""
BETAS = (0.9, 0.99)

Evaluate = Callable[[Tensor], tuple[float, Tensor]]
"""Weights (N,) of a mixture -> (loss, <loss gradient, candidate i> (N,)) at that mixture."""


@dataclass(frozen=True)
class Mask:
    """A learned mask.

    Attributes:
        probabilities: Keep probability of each candidate.
        history: Mean loss of the draws of each iteration; NaN where none was finite.
    """

    probabilities: tuple[float, ...]
    history: tuple[float, ...]

    def top(self, number: int) -> list[int]:
        """The `number` candidates kept, in ascending order; of equal ones the later."""
        order = sorted(range(len(self.probabilities)), key=lambda i: (-self.probabilities[i], -i))
        return sorted(order[:number])


def project(values: Tensor, total: float) -> Tensor:
    """The nearest point with all entries in [0, 1] and a sum of at most `total`."""
    clipped = values.clamp(0, 1)
    if clipped.sum() <= total:
        return clipped
    # All entries move down by one number. The sum falls with it and is linear between the points where an
    # entry reaches 0 or 1, so that the number lies on the segment whose ends enclose `total`.
    shifts = torch.cat([values.new_zeros(1), values, values - 1]).clamp_min(0).sort().values
    sums = (values - shifts[:, None]).clamp(0, 1).sum(1)
    after = int((sums > total).sum())
    share = (sums[after - 1] - total) / (sums[after - 1] - sums[after])
    return (values - torch.lerp(shifts[after - 1], shifts[after], share)).clamp(0, 1)


def relaxed(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """A draw of the relaxed mask: the keep side of a two-class Gumbel-Softmax.

    Args:
        logits: Log-odds of keeping (N,).
        temperature: Above 0.
        uniform: Numbers in (0, 1), (N,).
    """
    noise = uniform.log() - (-uniform).log1p()
    return ((logits + noise) / temperature).sigmoid()


def mixture(mask: Tensor, number: int, normalize: str) -> tuple[Tensor, float]:
    """(weights, divisor) of the mean under a relaxed mask, entries below `SKIP` left out."""
    kept = torch.where(mask >= SKIP, mask, 0.0)
    divisor = float(kept.sum()) if normalize == "sum" else float(number)
    return kept / max(divisor, SKIP), max(divisor, SKIP)


def mask_gradient(dots: Tensor, weights: Tensor, divisor: float, normalize: str) -> Tensor:
    """Gradient of the loss by each mask entry: <g, w_i - w> / sum z, or <g, w_i> / K under `count`."""
    if normalize == "count":
        return dots / divisor
    return (dots - weights.dot(dots)) / divisor


def learn(evaluate: Evaluate, num_candidates: int, num_select: int, options: SeWAOptions) -> Mask:
    """Learn which `num_select` of the candidates to keep.

    A draw whose loss or gradient is not finite is left out; an iteration without a finite one changes
    nothing.

    Args:
        evaluate: Loss and dot products at a mixture; a new minibatch at each call.
        num_candidates: N.
        num_select: K, below N.
        options: How.
    """
    generator = torch.Generator().manual_seed(options.seed)
    probabilities = options.parameterization == "prob"
    start = num_select / num_candidates if probabilities else 0.0
    state = torch.full((num_candidates,), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam(
        [state], lr=options.learning_rate or (0.02 if probabilities else 0.1), betas=BETAS
    )
    shift = math.log(num_select / (num_candidates - num_select))
    first, last = options.temperature
    history = []
    for step in range(options.steps):
        temperature = first * (last / first) ** (step / max(1, options.steps - 1))
        kept = state.detach().clamp(EDGE, 1 - EDGE)
        logits = kept.logit() if probabilities else state.detach() + shift
        gradient, losses = torch.zeros_like(kept), []
        for _ in range(options.mc_samples):
            uniform = torch.rand(num_candidates, generator=generator, dtype=torch.float64)
            mask = relaxed(logits, temperature, uniform.clamp(1e-12, 1 - 1e-12))
            forward = _hard(logits, uniform, num_select) if options.hard else mask
            weights, divisor = mixture(forward, num_select, options.normalize)
            loss, dots = evaluate(weights)
            by_mask = mask_gradient(dots.double().cpu(), weights, divisor, options.normalize)
            slope = mask * (1 - mask) / temperature
            by_state = by_mask * (slope / (kept * (1 - kept)) if probabilities else slope)
            if math.isfinite(loss) and bool(torch.isfinite(by_state).all()):
                gradient += by_state
                losses.append(loss)
        history.append(sum(losses) / len(losses) if losses else math.nan)
        if losses:
            state.grad = gradient / len(losses)
            optimizer.step()
            if probabilities:
                with torch.no_grad():
                    state.copy_(project(state, num_select))
    final = state.detach() if probabilities else (state.detach() + shift).sigmoid()
    return Mask(tuple(final.tolist()), tuple(history))


def _hard(logits: Tensor, uniform: Tensor, number: int) -> Tensor:
    """1 for the `number` highest noisy logits."""
    noisy = logits + uniform.clamp(1e-12, 1 - 1e-12).logit()
    return torch.zeros_like(logits).index_fill_(0, noisy.topk(number).indices, 1.0)
