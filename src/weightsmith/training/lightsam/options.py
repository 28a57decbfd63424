"""Options of the sharpness-aware optimisers. Nothing here imports torch: recipes read it to check a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from weightsmith.errors import InputError, nearest

if TYPE_CHECKING:
    from weightsmith.training.lightsam.optimizer import LightSAM
    from weightsmith.training.lightsam.sam import SAM

Variant = Literal["adam", "adagrad", "adagrad_norm"]

ALIASES: dict[str, Variant] = {
    "I": "adagrad_norm",
    "II": "adagrad",
    "III": "adam",
    "LightSAM-I": "adagrad_norm",
    "LightSAM-II": "adagrad",
    "LightSAM-III": "adam",
}
"""The paper's names of the variants."""

DEFAULTS: dict[Variant, tuple[float, float]] = {
    "adagrad_norm": (1.0, 0.1),
    "adagrad": (1e-2, 1e-2),
    "adam": (1e-3, 1e-3),
}
"""Learning rate and radius of each variant: lengths of the whole model's step, or of each coordinate's."""


@dataclass(frozen=True, kw_only=True)
class LightSAMOptions:
    """How LightSAM perturbs and steps; the learning rate and weight decay are the run's own.

    Attributes:
        variant: `adagrad_norm` (the paper's I: two running sums for the whole model), `adagrad` (II) or
            `adam` (III: running sums or means for every weight).
        rho: Scale of the perturbation, in the unit of the variant; None takes the variant's default.
        betas: Decays of the means and squares, on both passes (`adam` only).
        eps: Enters only as the squares' starting value eps².
        ascent_momentum: Perturb along the running mean of first gradients instead of this batch's (`adam`
            only).
        replay_rng: Give both passes of a batch the same random numbers (dropout masks).
        check_finite: Skip a step whose gradients are not finite; costs one read of the gradients for II and
            III.
    """

    variant: Variant = "adam"
    rho: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    ascent_momentum: bool = True
    replay_rng: bool = True
    check_finite: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "variant", resolve_variant(self.variant))
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.rho is not None:
            check_radius(self.rho)
        check_moments(self.betas, self.eps)

    def optimizer(self, params: Any, *, lr: float | None = None, weight_decay: float = 0.0) -> LightSAM:
        """The optimiser with these options."""
        from dataclasses import asdict

        from weightsmith.training.lightsam.optimizer import LightSAM

        return LightSAM(params, lr=lr, weight_decay=weight_decay, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class SAMOptions:
    """How SAM or ASAM perturbs before another optimiser's step.

    Attributes:
        rho: Length of the perturbation; None takes 0.05, or 0.5 when adaptive.
        adaptive: ASAM: measure lengths relative to the size of each weight.
        eta: Added to the size of each weight when adaptive.
        replay_rng: Give both passes of a batch the same random numbers (dropout masks).
    """

    rho: float | None = None
    adaptive: bool = False
    eta: float = 0.01
    replay_rng: bool = True

    def __post_init__(self) -> None:
        if self.rho is not None:
            check_radius(self.rho)
        if not 0 <= self.eta < math.inf:
            raise InputError(f"eta must be >= 0, got {self.eta}")

    def optimizer(self, params: Any, base_optimizer: Any, **base: Any) -> SAM:
        """The optimiser with these options around `base_optimizer(params, **base)`."""
        from dataclasses import asdict

        from weightsmith.training.lightsam.sam import SAM

        return SAM(params, base_optimizer, **asdict(self), **base)


def resolve_variant(name: str) -> Variant:
    """The variant behind a name or a paper's alias.

    Raises:
        InputError: no such variant; names the nearest.
    """
    known: dict[str, Variant] = {**{variant: variant for variant in DEFAULTS}, **ALIASES}
    if name not in known:
        raise InputError(
            f"no LightSAM variant `{name}`{nearest(str(name), known)}; known: {', '.join(known)}"
        )
    return known[name]


def check_radius(rho: float) -> None:
    """Refuse a radius that is negative or not finite."""
    if not 0 <= rho < math.inf:
        raise InputError(f"rho must be >= 0 and finite, got {rho}")


def check_moments(betas: tuple[float, ...], eps: float) -> None:
    """Refuse decays outside [0, 1) and a starting value that is not above 0."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"betas must be two numbers in [0, 1), got {betas}")
    if not 0 < eps < math.inf:
        raise InputError(f"eps enters only as the squares' starting value eps²; it must be > 0, got {eps}")
