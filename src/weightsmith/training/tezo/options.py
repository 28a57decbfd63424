"""Options of the zeroth-order optimisers. Nothing here imports torch: recipes read it to check a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from weightsmith.errors import InputError, nearest

if TYPE_CHECKING:
    from weightsmith.training.tezo.optimizer import LOZO, MeZO, TeZO
    from weightsmith.training.tezo.zeroth_order import ZerothOrder

Variant = Literal["sgd", "momentum", "adam", "lion"]
Restore = Literal["inplace", "snapshot", "branch"]

RATES: Mapping[str, float] = {"sgd": 1e-6, "momentum": 1e-6, "adam": 1e-5, "lion": 1e-6}
"""Learning rates for models of a billion weights; small ones want hundreds of times more."""

_ONLY = {
    "betas": ("momentum", "adam", "lion"),
    "eps": ("adam",),
    "bias_correction": ("adam",),
    "refresh_state": ("momentum", "adam", "lion"),
}
"""Options that only some variants heed."""


@dataclass(frozen=True, kw_only=True)
class ZerothOrderOptions:
    """What all zeroth-order optimisers have; the learning rate and weight decay are the run's own.

    Attributes:
        variant: What is made of the estimates: plain steps (`sgd`), steps along their running mean
            (`momentum`), or that divided by the root of their running squares (`adam`).
        rho: Size of the perturbation of every weight.
        betas: Decays of running means and squares (`momentum` has only the first).
        eps: Added to the root (`adam`).
        bias_correction: Divide running means and squares by what they lack in the first steps (`adam`).
        clip: Bound of the scalar that scales a step, the derivative along its direction; None sets none.
        restore: How weights come back from the two probes: `inplace` subtracts what was added, and the last
            subtraction and the step are one; `snapshot` keeps a copy of all weights and gives back every bit;
            `branch` never touches matrices and adds the perturbation to what their modules return.
        replay_rng: Give both probes the same random numbers (dropout masks).
        seed: Decides all directions; None takes 0, and in a recipe the run's own.
    """

    variant: Variant = "sgd"
    rho: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    bias_correction: bool = True
    clip: float | None = None
    restore: Restore = "inplace"
    replay_rng: bool = True
    seed: int | None = None

    kind: ClassVar[str]
    variants: ClassVar[tuple[str, ...]] = ("sgd", "momentum", "adam")
    restores: ClassVar[tuple[str, ...]] = ("inplace", "snapshot", "branch")

    def __post_init__(self) -> None:
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        _one_of("variant", self.variant, self.variants)
        _one_of("restore", self.restore, self.restores)
        check_rates({"rho": self.rho})
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        right = pair and all(0 <= _number(beta) < 1 for beta in self.betas)
        _expect("betas", self.betas, right, "two numbers in [0, 1)")
        _expect("eps", self.eps, 0 < _number(self.eps) < math.inf, "above 0 and finite")
        bounds = self.clip is None or 0 < _number(self.clip) < math.inf
        _expect("clip", self.clip, bounds, "above 0 and finite")
        whole = isinstance(self.seed, Integral) and not isinstance(self.seed, bool)
        _expect("seed", self.seed, self.seed is None or whole, "a whole number")

    def optimizer(self, params: Any, *, lr: float | None = None, **more: Any) -> ZerothOrder:
        """The optimiser with these options."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MeZOOptions(ZerothOrderOptions):
    """MeZO: a Gaussian number for every weight."""

    kind: ClassVar[str] = "mezo"
    restores: ClassVar[tuple[str, ...]] = ("inplace", "snapshot")

    def optimizer(self, params: Any, *, lr: float | None = None, **more: Any) -> MeZO:
        """The optimiser with these options."""
        from weightsmith.training.tezo.optimizer import MeZO

        return MeZO(params, lr, **_values(self), **more)


@dataclass(frozen=True, kw_only=True)
class _LowRankOptions(ZerothOrderOptions):
    """What TeZO and LOZO share.

    Attributes:
        scale: `unit` divides directions by the root of their rank, so that `rho` and the learning rate mean
            what they mean for MeZO at any rank; `paper` doesn't: rho and lr there are rho * sqrt(rank) and
            lr * rank here.
        freeze_1d: Leave biases and norms as they are; otherwise they get dense directions as in MeZO.
        stacked: Patterns of names of parameters with three axes that stack matrices along the first, as
            experts do. Others with more than two axes are seen as (first axis, all others).
    """

    scale: Literal["unit", "paper"] = "unit"
    freeze_1d: bool = False
    stacked: tuple[str, ...] = ("*expert*",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("scale", self.scale, ("unit", "paper"))
        patterns = (self.stacked,) if isinstance(self.stacked, str) else tuple(self.stacked)
        object.__setattr__(self, "stacked", patterns)


@dataclass(frozen=True, kw_only=True)
class TeZOOptions(_LowRankOptions):
    """TeZO: fixed factors for each matrix, and as few Gaussian numbers in each step as its rank.

    Attributes:
        rank: Rank of each matrix's directions: one number, patterns of names with a number each, or `auto`,
            which looks at the weights.
        rank_threshold: With `auto`, singular values count that are larger than this share of the largest.
        max_rank: With `auto`, the most.
        min_rank: With `auto`, the least.
        refresh_interval: Steps after which the factors are drawn anew; None keeps them, as the paper does.
        refresh_state: What becomes of running means then: `reset`, or `project` onto the new factors.
        factor_dtype: Dtype of the factors; None takes the weights'.
    """

    rank: int | Literal["auto"] | dict[str, int] = 32
    rank_threshold: float = 0.25
    max_rank: int = 64
    min_rank: int = 1
    refresh_interval: int | None = None
    refresh_state: Literal["reset", "project"] = "reset"
    factor_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    kind: ClassVar[str] = "tezo"
    variants: ClassVar[tuple[str, ...]] = ("sgd", "momentum", "adam", "lion")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, Mapping):
            _expect("rank", self.rank, bool(self.rank), "at least one pattern")
            for pattern, rank in self.rank.items():
                _expect(f"rank: {pattern}", rank, _is_count(rank), "a whole number of at least 1")
        elif self.rank != "auto":
            _expect("rank", self.rank, _is_count(self.rank), "a whole number of at least 1, patterns or auto")
        _expect("rank_threshold", self.rank_threshold, 0 <= _number(self.rank_threshold) < 1, "in [0, 1)")
        _expect("min_rank", self.min_rank, _is_count(self.min_rank), "a whole number of at least 1")
        most = _is_count(self.max_rank) and self.max_rank >= self.min_rank
        _expect("max_rank", self.max_rank, most, f"a whole number of at least min_rank ({self.min_rank})")
        every = self.refresh_interval
        _expect("refresh_interval", every, every is None or _is_count(every), "a whole number of at least 1")
        _one_of("refresh_state", self.refresh_state, ("reset", "project"))
        _one_of("factor_dtype", self.factor_dtype, (None, "float32", "bfloat16", "float16"))

    def optimizer(self, params: Any, *, lr: float | None = None, **more: Any) -> TeZO:
        """The optimiser with these options."""
        from weightsmith.training.tezo.optimizer import TeZO

        return TeZO(params, lr, **_values(self), **more)


@dataclass(frozen=True, kw_only=True)
class LOZOOptions(_LowRankOptions):
    """LOZO: one factor drawn in every step, the other every so many.

    Attributes:
        rank: Rank of the directions.
        interval: Steps for which one factor stays.
    """

    rank: int = 4
    interval: int = 50

    kind: ClassVar[str] = "lozo"
    variants: ClassVar[tuple[str, ...]] = ("sgd", "momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect("rank", self.rank, _is_count(self.rank), "a whole number of at least 1")
        _expect("interval", self.interval, _is_count(self.interval), "a whole number of at least 1")

    def optimizer(self, params: Any, *, lr: float | None = None, **more: Any) -> LOZO:
        """The optimiser with these options."""
        from weightsmith.training.tezo.optimizer import LOZO

        return LOZO(params, lr, **_values(self), **more)


KINDS: Mapping[str, type[ZerothOrderOptions]] = {
    "tezo": TeZOOptions,
    "mezo": MeZOOptions,
    "lozo": LOZOOptions,
}
"""The family by the names of its pages."""


def without_effect(options: ZerothOrderOptions, given: Mapping[str, Any]) -> dict[str, str]:
    """Options among `given` that change nothing beside the others, with the reason."""
    found = {
        key: f"has no effect with variant `{options.variant}`"
        for key, variants in _ONLY.items()
        if key in given and options.variant not in variants
    }
    if isinstance(options, TeZOOptions):
        if options.rank != "auto":
            for key in ("rank_threshold", "max_rank", "min_rank"):
                if key in given:
                    found[key] = "has no effect without `rank: auto`"
        if options.refresh_interval is None and "refresh_state" in given:
            found["refresh_state"] = "has no effect without `refresh_interval`"
    return found


def check_rates(rates: Mapping[str, Any]) -> None:
    """Refuse a learning rate, weight decay or rho that is out of range, as far as they are there.

    Raises:
        InputError: names the value.
    """
    for key in ("lr", "weight_decay"):
        if key in rates:
            _expect(key, rates[key], 0 <= _number(rates[key]) < math.inf, "at least 0 and finite")
    if "rho" in rates:
        _expect("rho", rates["rho"], 0 < _number(rates["rho"]) < math.inf, "above 0 and finite")


def check_group(group: Mapping[str, Any], options: ZerothOrderOptions) -> None:
    """Refuse what a parameter group can't have of its own, or not with this value.

    Raises:
        InputError: names the key.
    """
    own = ("lr", "rho", "weight_decay", *(("rank",) if isinstance(options, _LowRankOptions) else ()))
    for key in group:
        if key not in (*own, "params", "param_names", "initial_lr"):
            expected = f"{', '.join(own[:-1])} or {own[-1]}"
            raise InputError(f"{key}: groups have no such key, expected {expected}{nearest(str(key), own)}")
    check_rates(group)
    options_of(group, options)


def options_of(group: Mapping[str, Any], options: ZerothOrderOptions) -> ZerothOrderOptions:
    """The options with a parameter group's own rank."""
    if "rank" not in group:
        return options
    assert isinstance(options, TeZOOptions | LOZOOptions)
    return dataclasses.replace(options, rank=group["rank"])


def _values(options: ZerothOrderOptions) -> dict[str, Any]:
    return {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}


def _number(value: Any) -> float:
    """The value, or where it is no number the one that no range holds."""
    if isinstance(value, bool | str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _one_of(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        hint = nearest(value, [c for c in choices if c]) if isinstance(value, str) else ""
        raise InputError(f"{key}: expected one of {known}, got {value!r}{hint}")


def _expect(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{key}: expected {expected}, got {value!r}")
