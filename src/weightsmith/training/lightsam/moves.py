"""The half-steps of LightSAM: update a running square, move the weights along gradient over root.

Each algorithm is two calls of one of these: up with the first gradient and rate rho, down with the second and
rate -lr. Where torch has a fused kernel for the weights' device and their dtype is the state's, one half-step
is one kernel: SGD for I, Adagrad without epsilon for II, Adam without epsilon and at a step so late that its
bias corrections are exactly 1 for III. Otherwise foreach operations, in float32, on tensors of bounded size
at a time.

All take lists of one group: values (weights, moved in place), gradients (left alone), state (updated in
place). `skip` is a 0-d float32 tensor: where it is 1 the kernels change nothing, without the host knowing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TINY = 1e-36
"""Floor of running squares: below it float32 turns subnormal, and 0 / 0 follows where that is flushed."""

LEAST_DECAY = 0.1
"""Decay below which one step can take a floored square to 0, so that the kernels can't be used."""

_LATE = 1e9
_AT_ONCE = 1 << 25


def add_scaled(
    values: list[Tensor], gradients: list[Tensor], rate: float | Tensor, skip: Tensor | None
) -> None:
    """Add: values += rate * gradients. A `rate` on an accelerator is used there, unread."""
    if not isinstance(rate, Tensor):
        torch._foreach_add_(values, gradients, alpha=rate)
        return
    for dtype in {value.dtype for value in values}:
        chosen = [i for i, value in enumerate(values) if value.dtype == dtype]
        torch._fused_sgd_(
            [values[i] for i in chosen],
            [gradients[i] for i in chosen],
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=-rate.float(),
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=skip,
        )


def adagrad_move(
    values: list[Tensor],
    gradients: list[Tensor],
    sums: list[Tensor],
    rate: float,
    *,
    fused: bool,
    skip: Tensor | None = None,
) -> None:
    """AdaGrad: sums += gradients²; values += rate * gradients / sqrt(sums)."""
    if fused:
        late = torch.tensor(_LATE, device=values[0].device)
        torch._fused_adagrad_(
            values,
            gradients,
            sums,
            [late] * len(values),
            lr=-rate,
            lr_decay=0.0,
            weight_decay=0.0,
            eps=0.0,
            maximize=False,
            found_inf=skip,
        )
        return
    for part in _parts(values):
        wide = _wide([gradients[i] for i in part])
        total = [sums[i] for i in part]
        torch._foreach_addcmul_(total, wide, wide)
        _divide_and_add([values[i] for i in part], wide, total, rate)


def adam_move(
    values: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    rate: float,
    *,
    betas: tuple[float, float],
    fused: bool,
    decay: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """Adam: means, squares <- decayed; values <- (1 - decay) values + rate * means / sqrt(squares)."""
    if fused:
        late = torch.tensor(_LATE, device=values[0].device)
        torch._fused_adamw_(
            values,
            gradients,
            means,
            squares,
            [],
            [late] * len(values),
            lr=-rate,
            beta1=betas[0],
            beta2=betas[1],
            # The kernel shrinks weights by lr * weight_decay.
            weight_decay=-decay / rate if decay else 0.0,
            eps=0.0,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )
        return
    if decay:
        torch._foreach_mul_(values, 1 - decay)
    for part in _parts(values):
        wide = _wide([gradients[i] for i in part])
        mean, square = [means[i] for i in part], [squares[i] for i in part]
        torch._foreach_lerp_(mean, wide, 1 - betas[0])
        torch._foreach_mul_(square, betas[1])
        torch._foreach_addcmul_(square, wide, wide, 1 - betas[1])
        _divide_and_add([values[i] for i in part], mean, square, rate)


def floor_squares(squares: list[Tensor], steps: int, beta2: float) -> None:
    """Raise decayed squares to `TINY`, once in as many steps as they need to lose a factor of ten.

    The kernels have no epsilon, so a weight that never gets a gradient would divide 0 by 0 once its square is
    gone.
    """
    period = max(1, math.floor(math.log(0.1) / math.log(beta2)))
    if steps % period == 0:
        torch._foreach_clamp_min_(squares, TINY)


def _divide_and_add(values: list[Tensor], above: list[Tensor], squares: list[Tensor], rate: float) -> None:
    roots = torch._foreach_sqrt(squares)
    torch._foreach_clamp_min_(roots, 1e-20)
    if values[0].dtype == roots[0].dtype:
        torch._foreach_addcdiv_(values, above, roots, rate)
        return
    # Rounded once: the quotient is float32, and so is its sum with the weight before it is stored in 16 bits.
    torch._foreach_reciprocal_(roots)
    torch._foreach_mul_(roots, above)
    torch._foreach_add_(values, roots, alpha=rate)


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors]


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices in runs of one dtype and bounded size: the float32 copies of a run live at once."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        part: list[int] = []
        held = 0
        for index, tensor in enumerate(tensors):
            if tensor.dtype != dtype:
                continue
            if part and held + tensor.numel() > _AT_ONCE:
                yield part
                part, held = [], 0
            part.append(index)
            held += tensor.numel()
        yield part
