"""The AdaGC rule on vectors of norms: no loop over tensors, no branch on a value, no copy to the host.

Source   Wang et al., "AdaGC", arXiv:2502.11034, and the authors' code (lishuai-97/AdaGC).
Warm-up  t <= T: N = sqrt(sum n_i^2), c = min(1, lambda_abs / (N + eps)); g_i <- c g_i;
         gamma_i <- min(gamma_i, c n_i)
After    h_i = 1 if n_i <= lambda_rel gamma_i else lambda_rel gamma_i / (n_i + eps);  g_i <- h_i g_i;
         gamma_i <- beta gamma_i + (1 - beta) min(n_i, lambda_rel gamma_i)
Decided  A norm of 0 neither seeds nor moves gamma: gamma = 0 would freeze its tensor for ever (LoRA's A while
B is here     0, an expert without tokens). A tensor first seen after warm-up is not clipped on that step.
Non-finite
         tensors are left out of N and get 0. A step in which no tensor has a gradient doesn't count.
Letters  S slots, one for each tensor that is clipped by itself
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.training.adagc.options import AdaGCOptions


class Clipping(NamedTuple):
    """One step's outcome; vectors have one entry for each slot.

    Attributes:
        coefficient_S: What each gradient is multiplied by, float32; 0 where it is not finite.
        gamma_S: The running means after the step, float32; infinity where none is known yet.
        steps: Steps counted so far, 0-d int64.
        global_norm: Norm of all finite gradients before clipping, 0-d float32.
        finite_S: Whether each norm is finite, bool.
        live_S: Whether each norm is finite and above 0, bool.
    """

    coefficient_S: Tensor
    gamma_S: Tensor
    steps: Tensor
    global_norm: Tensor
    finite_S: Tensor
    live_S: Tensor


def clip_norms(
    norm_S: Tensor,
    total: Tensor,
    gamma_S: Tensor,
    steps: Tensor,
    options: AdaGCOptions,
    excluded_S: Tensor | None = None,
) -> Clipping:
    """Coefficients and new running means for gradients of norms `norm_S`.

    Args:
        norm_S: Norms before clipping, (S,) float32.
        total: Norm of all finite gradients, 0-d float32.
        gamma_S: Running means, (S,) float32, infinity where unset.
        steps: Steps counted before this one, 0-d int64.
        options: The rule's constants.
        excluded_S: Slots outside the per-tensor rule, (S,) bool.
    """
    finite_S = torch.isfinite(norm_S)
    live_S = finite_S & (norm_S > 0)
    steps = steps + (live_S | ~finite_S).any()
    warm = steps <= options.warmup_steps
    common = (options.lambda_abs / (total + options.eps)).clamp(max=1.0)

    seed_S = common * norm_S
    unset_S = torch.isinf(gamma_S)
    if options.init == "min":
        seeded_S = torch.minimum(gamma_S, seed_S)
    elif options.init == "ema":
        seeded_S = torch.where(unset_S, seed_S, options.beta * gamma_S + (1 - options.beta) * seed_S)
    else:
        seeded_S = seed_S

    limit_S = options.lambda_rel * gamma_S
    over_S = (norm_S > limit_S) & ~unset_S
    own_S = torch.where(over_S, limit_S / (norm_S + options.eps), 1.0)
    clipped_S = torch.minimum(norm_S, limit_S)
    tracked_S = torch.where(unset_S, norm_S, options.beta * gamma_S + (1 - options.beta) * clipped_S)

    if excluded_S is not None:
        outside = common if options.exclude_mode == "global" else torch.ones_like(common)
        own_S = torch.where(excluded_S, outside, own_S)
    coefficient_S = torch.where(warm, common, own_S)
    if excluded_S is not None and options.exclude_mode == "none":
        coefficient_S = torch.where(excluded_S, 1.0, coefficient_S)
    new_S = torch.where(warm, seeded_S, tracked_S).clamp(min=options.gamma_min)
    return Clipping(
        coefficient_S=torch.where(finite_S, coefficient_S, 0.0),
        gamma_S=torch.where(live_S, new_S, gamma_S),
        steps=steps,
        global_norm=total,
        finite_S=finite_S,
        live_S=live_S,
    )
