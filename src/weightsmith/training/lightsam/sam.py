"""SAM and ASAM around any optimiser: the baselines of LightSAM, in the same two-pass frame.

SAM   w = x + rho s / |s|; then the base optimiser steps from x with the gradient at w. (Foret et al.,
arXiv:2010.01412) ASAM  lengths relative to each weight's size, T = |x| + eta: w = x + rho T^2 s / |T s|.
(Kwon et al., arXiv:2102.11600,
      whose code leaves biases out of T; here every weight is in, as eta keeps zeros movable)
The norm is that of all gradients together, over all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.errors import InputError
from weightsmith.training.lightsam.moves import add_scaled
from weightsmith.training.lightsam.options import check_radius
from weightsmith.training.lightsam.two_pass import Piece, TwoPassOptimizer

GUARD = 1e-12
"""Added to the norm that divides, as in the code everyone starts from (davda54/sam)."""


class SAM(TwoPassOptimizer):
    """Sharpness-aware minimisation around a base optimiser.

    Args:
        params: As for any optimiser; groups may have their own `rho`.
        base_optimizer: Class (or function) that makes the optimiser of the second gradient from groups.
        rho: Length of the perturbation; default 0.05, or 0.5 when adaptive.
        adaptive: ASAM: lengths relative to each weight's size.
        eta: Added to that size.
        model: Its batch normalisation keeps its running statistics out of the second pass.
        replay_rng: Give both calls of a closure the same random numbers.
        check_finite: Skip steps whose gradients are not finite.
        **base: Arguments of the base optimiser.

    Raises:
        InputError: `rho` or `eta` out of range.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Any,
        rho: float | None = None,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
        model: nn.Module | None = None,
        replay_rng: bool = True,
        check_finite: bool = True,
        **base: Any,
    ) -> None:
        rho = (0.5 if adaptive else 0.05) if rho is None else rho
        check_radius(rho)
        if eta < 0:
            raise InputError(f"eta must be >= 0, got {eta}")
        self.adaptive = adaptive
        self._needs_norm = not adaptive
        defaults = {"rho": rho, "eta": eta}
        super().__init__(params, defaults, model=model, replay_rng=replay_rng, check_finite=check_finite)
        self.base: torch.optim.Optimizer = base_optimizer(self.param_groups, **base)
        self._follow_base()

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state: there is no other."""
        super().state_dict()
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base optimiser."""
        self.base.load_state_dict(state_dict)
        self._follow_base()

    def _follow_base(self) -> None:
        """Share groups and state, so that schedulers and savers see one optimiser."""
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.defaults = {**self.base.defaults, **self.defaults}

    def _make_state(self, pieces: list[Piece]) -> None:
        self.base.step()

    def _ascend(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None) -> None:
        sizes: list[Tensor] = []
        gradients = [piece.gradient for piece in pieces]
        if self.adaptive:
            sizes = list(torch._foreach_abs([piece.value for piece in pieces]))
            torch._foreach_add_(sizes, [piece.group["eta"] for piece in pieces])
            # The first gradients are used up here, so they can be scaled in place.
            torch._foreach_mul_(gradients, sizes)
            norm = self._squares({piece.parameter: piece.gradient for piece in pieces}).sum().sqrt()
            torch._foreach_mul_(gradients, sizes)
        assert norm is not None
        length = norm + GUARD
        on_host = float(length) if length.device.type == "cpu" else length
        for group in self.param_groups:
            chosen = [piece for piece in pieces if piece.group is group]
            if chosen:
                values, along = [piece.value for piece in chosen], [piece.gradient for piece in chosen]
                add_scaled(values, along, group["rho"] / on_host, skip)

    def _descend(self, pieces: list[Piece], norm: Tensor | None, skip: Tensor | None) -> None:
        self.base.step()


class ASAM(SAM):
    """SAM whose lengths are relative to the size of each weight; `rho` is 0.5 by default.

    Args:
        params: As for SAM.
        base_optimizer: As for SAM.
        rho: Length of the perturbation, relative to the weights.
        **options: As for SAM.
    """

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.5, **options: Any) -> None:
        super().__init__(params, base_optimizer, rho, adaptive=True, **options)
