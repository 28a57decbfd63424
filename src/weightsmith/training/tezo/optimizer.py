"""TeZO, MeZO and LOZO: optimisers that need forward passes only.

Problem  Backpropagation keeps activations, gradients and two moments for every weight: several times the
         memory of the model. A step along a random direction needs two losses and none of that; but MeZO
         draws as many random numbers as there are weights four times a step, and its momentum and Adam keep
         buffers as large as the weights.
Method   kappa = (f(W + rho Z) - f(W - rho Z)) / (2 rho) of one batch; then a step along kappa Z.
         TeZO draws two factors of each matrix once, and only tau in a step: Z = U diag(tau) V^T.
           sgd       W -= lr kappa Z
           momentum  m = b1 m + (1 - b1) kappa tau;  W -= lr U diag(m) V^T
           adam      v = b2 v + (1 - b2) (kappa tau)^2;
                     W -= lr U diag(m) V^T / (sqrt(U^2 diag(v) V^2^T) + eps)
           lion      W -= lr sign(U diag(b1 m + (1 - b1) kappa tau) V^T)
Source   TeZO arXiv:2501.19057 (no author code exists), MeZO arXiv:2305.17333, LOZO arXiv:2410.07698.
         Decided here: directions are divided by the root of their rank (`scale`); bias correction in adam;
         the form of momentum and lion; the threshold of automatic ranks; LOZO's momentum is carried to a new
         V by V_old^T V / n.
Cost     Two forward passes and three sweeps over the weights; the last undoes the second probe and makes the
         step. State: one or two vectors as long as the rank for each matrix, and its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from weightsmith.training.tezo.options import LOZOOptions, MeZOOptions, TeZOOptions
from weightsmith.training.tezo.zeroth_order import ZerothOrder


class TeZO(ZerothOrder):
    """Zeroth-order steps along directions of low rank: fixed factors whose weights are drawn anew.

    Args:
        params: As for any optimiser; `model.named_parameters()` keys the directions by name.
        lr: Learning rate; by default 1e-6 (`adam`: 1e-5), for models of a billion weights.
        rho: Size of the perturbation of every weight.
        rank: Rank of each matrix's directions: a number, patterns of names with a number each, or "auto".
        variant: `sgd`, `momentum`, `adam` or `lion`.
        betas: Decays of running means and squares.
        eps: Added to the root (`adam`).
        weight_decay: Decoupled decay of what has at least two axes.
        maximize: Climb instead of descend.
        model: Needed by `restore="branch"`, and where it is sharded by FSDP2; its batch normalisation keeps
            its running statistics out of the second probe.
        process_group: "auto", None or a group: see `ZerothOrder`.
        save_factors: Put factors into state dicts; otherwise they are drawn again.
        **options: The other fields of `TeZOOptions`.

    Raises:
        InputError: a value out of range; no parameter that can be trained this way.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(4, 3))
        >>> optimizer = TeZO([("w", w)], lr=0.02, rank=2)
        >>> for _ in range(200):
        ...     loss = optimizer.step(lambda: (w - 2).square().mean())
        >>> bool(loss < 0.8)
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        rho: float = 1e-3,
        rank: Any = 32,
        variant: Any = "sgd",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        process_group: Any = "auto",
        save_factors: bool = False,
        **options: Any,
    ) -> None:
        made = TeZOOptions(rho=rho, rank=rank, variant=variant, betas=betas, eps=eps, **options)
        super().__init__(
            params,
            lr,
            made,
            weight_decay=weight_decay,
            maximize=maximize,
            model=model,
            process_group=process_group,
            save_factors=save_factors,
        )


class TeZOMomentum(TeZO):
    """TeZO whose steps go along the running mean of its estimates: one vector for each matrix."""

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, variant=options.pop("variant", "momentum"), **options)


class TeZOAdam(TeZO):
    """TeZO with Adam's mean and square: two vectors for each matrix."""

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, variant=options.pop("variant", "adam"), **options)


class MeZO(ZerothOrder):
    """Zeroth-order steps along dense Gaussian directions: the baseline.

    Args:
        params: As for any optimiser.
        lr: Learning rate; by default 1e-6 (`adam`: 1e-5), for models of a billion weights.
        rho: Size of the perturbation of every weight.
        variant: `sgd`, `momentum` or `adam`; the last two keep one or two buffers as large as the weights.
        betas: Decays of running means and squares.
        eps: Added to the root (`adam`).
        weight_decay: Decoupled decay of what has at least two axes.
        **options: As for TeZO, where they are fields of `MeZOOptions`.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(4, 3))
        >>> optimizer = MeZO([("w", w)], lr=0.02)
        >>> for _ in range(200):
        ...     loss = optimizer.step(lambda: (w - 2).square().mean())
        >>> bool(loss < 0.5)
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        rho: float = 1e-3,
        variant: Any = "sgd",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        shared, own = _split(options)
        made = MeZOOptions(rho=rho, variant=variant, betas=betas, eps=eps, **own)
        super().__init__(params, lr, made, weight_decay=weight_decay, **shared)


class MeZOMomentum(MeZO):
    """MeZO whose steps go along the running mean of its estimates: a buffer as large as the weights."""

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, variant=options.pop("variant", "momentum"), **options)


class MeZOAdam(MeZO):
    """MeZO with Adam's mean and square: two buffers as large as the weights."""

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, variant=options.pop("variant", "adam"), **options)


class LOZO(ZerothOrder):
    """Zeroth-order steps along directions of low rank, one factor of which stays for some steps.

    Args:
        params: As for any optimiser.
        lr: Learning rate; by default 1e-6, for models of a billion weights.
        rho: Size of the perturbation of every weight.
        rank: Rank of the directions.
        interval: Steps for which one factor stays.
        variant: `sgd` or `momentum`.
        betas: The first is the decay of the running mean.
        weight_decay: Decoupled decay of what has at least two axes.
        **options: As for TeZO, where they are fields of `LOZOOptions`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        rho: float = 1e-3,
        rank: int = 4,
        interval: int = 50,
        variant: Any = "sgd",
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        shared, own = _split(options)
        made = LOZOOptions(rho=rho, rank=rank, interval=interval, variant=variant, betas=betas, **own)
        super().__init__(params, lr, made, weight_decay=weight_decay, **shared)


class LOZOMomentum(LOZO):
    """LOZO whose steps go along the running mean of its estimates: a buffer as large as one factor."""

    def __init__(self, params: Any, lr: float | None = None, **options: Any) -> None:
        super().__init__(params, lr, variant=options.pop("variant", "momentum"), **options)


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of every optimiser of the family, and fields of its options."""
    shared = ("maximize", "model", "process_group", "save_factors")
    mine = {key: value for key, value in options.items() if key in shared}
    return mine, {key: value for key, value in options.items() if key not in shared}
