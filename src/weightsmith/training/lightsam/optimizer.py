"""LightSAM: sharpness-aware minimisation whose radius and learning rate follow running gradient statistics.

Problem  SAM's radius and learning rate have to be tuned together, at two gradients a step.
Method   x the weights, s the gradient there, w the perturbed point, g the gradient there, of the same batch:
         I    u += |s|^2;  w = x + rho s / sqrt(u);  v += |g|^2;  x <- x - lr g / sqrt(v)      (scalars u, v)
         II   u += s*s;    w = x + rho s / sqrt(u);  v += g*g;    x <- x - lr g / sqrt(v)      (for every
         weight) III  r, u = means of s, s*s;  w = x + rho r / sqrt(u);  m, v = means of g, g*g;  x <- x - lr
         m / sqrt(v) u and v start at eps^2, squares are updated before their use, nothing is bias-corrected,
         and no epsilon is added to a root.
Source   arXiv:2505.24399, algorithms as transcribed by two independent readers (no author code exists).
         Decided here: decoupled weight decay at x; a step with a gradient that is not finite is skipped;
         where only the second is not finite, u and r keep the first, which was one. Roots are bounded below,
         so that squares that decayed to 0 (rows of an embedding that never occur) can't make 0 / 0.
Cost     Two forward and backward passes. State: two numbers (I), two (II) or four (III) tensors like the
         weights, and one copy of them while a step runs.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.lightsam.moves import (
    LEAST_DECAY,
    TINY,
    adagrad_move,
    adam_move,
    add_scaled,
    floor_squares,
)
from weightsmith.training.lightsam.options import DEFAULTS, check_moments, check_radius, resolve_variant
from weightsmith.training.lightsam.two_pass import Piece, TwoPassOptimizer, real
from weightsmith.training.sharded import local

logger = logging.getLogger(__name__)

WIDE_RADIUS, MANY_WEIGHTS = 2e-2, 100_000

_STATE = {
    "adagrad": {"ascent_sum": 1, "sum": 1},
    "adam": {"ascent_exp_avg": 0, "ascent_exp_avg_sq": 1, "exp_avg": 0, "exp_avg_sq": 1},
}
"""State of each weight, and whether it starts at eps² rather than 0."""


class LightSAM(TwoPassOptimizer):
    """Sharpness-aware minimisation with AdaGrad-Norm, AdaGrad or Adam statistics on both passes.

    Args:
        params: As for any optimiser; groups may have their own `lr`, `rho` and `weight_decay`.
        lr: Learning rate. For `adagrad_norm` the length of the whole model's first step (default 1.0),
            otherwise of every coordinate's (default 1e-2 for `adagrad`, 1e-3 for `adam`, whose first step is
            3.16 times that).
        rho: Perturbation, in the same unit (default 0.1, 1e-2, 1e-3). SAM's 0.05 is another unit.
        variant: `adagrad_norm`, `adagrad` or `adam`; or the paper's names `I`, `II`, `III`.
        betas: Decays of means and squares (`adam`).
        eps: Enters only as the squares' starting value eps².
        weight_decay: Decoupled decay.
        maximize: Climb instead of descend.
        ascent_momentum: Perturb along the mean of first gradients; otherwise along this batch's (`adam`).
        fused: Use torch's fused kernels; None where weights are float32 or float64 on a CPU or a CUDA device.
        model: Its batch normalisation keeps its running statistics out of the second pass.
        replay_rng: Give both calls of a closure the same random numbers.
        check_finite: Skip steps whose gradients are not finite.

    Raises:
        InputError: a value out of range, an unknown variant.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = LightSAM([w], lr=0.1, rho=0.1, variant="adagrad_norm")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (w**2).sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        0.5
        >>> w.data
        tensor([0.9000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        rho: float | None = None,
        variant: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        ascent_momentum: bool = True,
        fused: bool | None = None,
        model: nn.Module | None = None,
        replay_rng: bool = True,
        check_finite: bool = True,
    ) -> None:
        self.variant = resolve_variant(variant)
        lr = DEFAULTS[self.variant][0] if lr is None else lr
        rho = DEFAULTS[self.variant][1] if rho is None else rho
        if not 0 <= lr < math.inf:
            raise InputError(f"lr must be >= 0 and finite, got {lr}")
        check_radius(rho)
        check_moments(betas, eps)
        if not 0 <= weight_decay < math.inf:
            raise InputError(f"weight_decay must be >= 0, got {weight_decay}")
        defaults = {"lr": lr, "rho": rho, "weight_decay": weight_decay, "maximize": maximize, "step": 0}
        defaults |= {"betas": tuple(betas), "eps": eps, "ascent_momentum": ascent_momentum}
        super().__init__(params, defaults, model=model, replay_rng=replay_rng, check_finite=check_finite)
        self._fused = self._kernels_fit() if fused is None else fused
        if fused and not self._kernels_fit():
            raise InputError(
                "fused kernels need float32 or float64 weights on a CPU or CUDA device"
                f", and a second beta of at least {LEAST_DECAY} for adam"
            )
        self._needs_norm = self.variant == "adagrad_norm"
        self._advise()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; running sums keep their dtype."""
        super().load_state_dict(state_dict)
        group = self.param_groups[0]
        if "ascent_sum" in group:
            device = local(group["params"][0]).device
            self._share_sums(group["ascent_sum"].to(device), group["descent_sum"].to(device))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, between steps; the running sums of `adagrad_norm` go on."""
        super().add_param_group(param_group)
        first = self.param_groups[0]
        if "ascent_sum" in first:
            self._share_sums(first["ascent_sum"], first["descent_sum"])

    def _ascend(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None) -> None:
        self._half(pieces, norm, skip, first=True)

    def _descend(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None) -> None:
        for group in self.param_groups:
            group["step"] += 1
        self._half(pieces, norm, skip, first=False)

    def _half(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None, *, first: bool) -> None:
        """One half-step: `first` up with the radius, else down with the learning rate."""
        length = None
        if self.variant == "adagrad_norm" and norm is not None:
            length = self._length(norm, skip, first=first)
        for group in self.param_groups:
            chosen = [piece for piece in pieces if piece.group is group]
            if not chosen:
                continue
            rate = group["rho"] if first else -group["lr"]
            rate = -rate if group["maximize"] else rate
            decay = 0.0 if first else group["lr"] * group["weight_decay"]
            if self.variant == "adam":
                self._adam_half(chosen, rate, decay, skip, first=first)
                continue
            values = [piece.value for piece in chosen]
            gradients = [piece.gradient for piece in chosen]
            if decay:
                _shrink(values, decay, skip)
            if length is not None:
                add_scaled(values, gradients, rate / length, skip)
            else:
                sums = self._state(chosen, "ascent_sum" if first else "sum", group["eps"] ** 2)
                adagrad_move(values, gradients, sums, rate, fused=self._fused, skip=skip)

    def _adam_half(
        self, chosen: list[Piece], rate: float, decay: float, skip: Tensor | None, *, first: bool
    ) -> None:
        group, prefix = chosen[0].group, "ascent_" if first else ""
        values = [piece.value for piece in chosen]
        means = self._state(chosen, prefix + "exp_avg", 0.0)
        squares = self._state(chosen, prefix + "exp_avg_sq", group["eps"] ** 2)
        beta1, beta2 = group["betas"]
        if first and not group["ascent_momentum"]:
            beta1 = 0.0
        if self._fused:
            floor_squares(squares, group["step"], beta2)
        if decay and rate == 0:
            # The kernel shrinks by its learning rate times the decay; a rate of 0 leaves it nothing.
            _shrink(values, decay, skip)
            decay = 0.0
        adam_move(
            values,
            [piece.gradient for piece in chosen],
            means,
            squares,
            rate,
            betas=(beta1, beta2),
            fused=self._fused,
            decay=decay,
            skip=skip,
        )

    def _length(self, norm: Tensor, skip: Tensor | None, *, first: bool) -> float | Tensor:
        """Root of the sum of squared norms, this one's included; a number where the host may know it."""
        self._start_sums(norm.dtype, norm.device)
        total: Tensor = self.param_groups[0]["ascent_sum" if first else "descent_sum"]
        square = norm.square()
        total += square if skip is None else torch.where(skip > 0, 0.0, square)
        length = total.sqrt()
        return float(length) if length.device.type == "cpu" else length

    def _make_state(self, pieces: list[Piece]) -> None:
        if self.variant == "adagrad_norm":
            device = pieces[0].value.device
            self._start_sums(torch.float32 if device.type == "mps" else torch.float64, device)
            return
        for piece in pieces:
            for name, start in _STATE[self.variant].items():
                self._state([piece], name, start * piece.group["eps"] ** 2)

    def _start_sums(self, dtype: torch.dtype, device: torch.device) -> None:
        if "ascent_sum" not in self.param_groups[0]:
            start = max(self.param_groups[0]["eps"] ** 2, TINY)
            self._share_sums(*(torch.full((), start, dtype=dtype, device=device) for _ in range(2)))

    def _share_sums(self, ascent: Tensor, descent: Tensor) -> None:
        """I has one sum for all groups. It lives in them: `state` would be cast to the weights' dtype."""
        for group in self.param_groups:
            group["ascent_sum"], group["descent_sum"] = ascent, descent

    def _state(self, chosen: list[Piece], name: str, start: float) -> list[Tensor]:
        """Local pieces of a state tensor of each parameter, made on first use; float32 at least."""
        for piece in chosen:
            state = self.state[piece.parameter]
            if name not in state:
                like = real(piece.parameter.detach())
                dtype = torch.float32 if like.dtype.itemsize < 4 else like.dtype
                state[name] = torch.full_like(like, max(start, TINY) if start else 0.0, dtype=dtype)
        return [local(self.state[piece.parameter][name]) for piece in chosen]

    def _can_skip(self, pieces: list[Piece]) -> bool:
        return pieces[0].value.device.type == "cuda" and (self._fused or self.variant == "adagrad_norm")

    def _kernels_fit(self) -> bool:
        def fits(parameter: Tensor) -> bool:
            value = local(parameter)
            return real(value).dtype in (torch.float32, torch.float64) and value.device.type in (
                "cpu",
                "cuda",
            )

        for group in self.param_groups:
            if self.variant == "adam" and group["betas"][1] < LEAST_DECAY:
                return False
            if not all(fits(parameter) for parameter in group["params"]):
                return False
        return True

    def _advise(self) -> None:
        weights = sum(parameter.numel() for group in self.param_groups for parameter in group["params"])
        widest = max(group["rho"] for group in self.param_groups)
        if self.variant != "adagrad_norm" and widest >= WIDE_RADIUS and weights >= MANY_WEIGHTS:
            logger.warning(
                "LightSAM: rho %g is a length for each coordinate here, about %.3g for all %d weights; "
                "SAM's values are of the whole",
                widest,
                widest * math.sqrt(weights),
                weights,
            )
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            if self.variant == "adam" and beta1**2 >= beta2:
                logger.warning("LightSAM: betas %s: with beta1² >= beta2 steps are unbounded", group["betas"])
        if any(local(p).dtype.itemsize < 4 for group in self.param_groups for p in group["params"]):
            logger.warning(
                "LightSAM: 16-bit weights round small perturbations away; keep float32 weights and autocast"
            )


def _shrink(values: list[Tensor], decay: float, skip: Tensor | None) -> None:
    """Decoupled weight decay, unless the step is skipped."""
    if skip is None:
        torch._foreach_mul_(values, 1 - decay)
    else:
        torch._foreach_mul_(values, torch.where(skip > 0, 1.0, 1 - decay))
