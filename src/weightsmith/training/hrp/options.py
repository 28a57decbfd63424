"""Options of HRP, and of the adapters that a fine-tune may train. Nothing here imports torch: recipes read it
to check a page.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from weightsmith.errors import InputError, nearest

MOST_RANK = 128
"""Rank of the preheat where none is given: this, or 16 times that of the adapter if that is less."""
STEPS = 100
"""Steps of the preheat where none are given and the length of the run isn't known."""
RATE = 1e-3
"""Learning rate of the preheat where none is given and that of the run isn't known."""


@dataclass(frozen=True, kw_only=True)
class HRPOptions:
    """How the direction is found. The paper fixes the idea; all but `assign: A` and `trainable` is this
    library's choice.

    Attributes:
        preheat_rank: Rank of the large adapter; by default 128, at most 16 times that of the small one, which
            must be smaller: one of 128 or more needs a rank given. A mapping of patterns to ranks as PEFT's
            `rank_pattern`. No layer gets more than its smaller side.
        preheat_steps: Steps of the preheat; by default 3 % of the run's, at least 10 and at most a fifth; 100
            where the run's are not known.
        preheat_lr: Its learning rate, constant; by default the run's, 1e-3 where that is not known. An
            optimiser of your own has its own.
        trainable: `both` factors of the large adapter, or `B` alone: the direction then hardly leaves the
        random
            one that A began with, unless the rank is near the layer's width.
        preheat_a: What A begins with: orthonormal rows, or PEFT's uniform numbers (`kaiming`).
        preheat_scale: What the large adapter's product is multiplied with: the small one's scale times
            sqrt(r / R), the same scale (`same`), or as the given `lora_alpha` makes it.
        preheat_optimizer: `adamw` without weight decay, or `sgd`; in Python also a function of the
        parameters.
        assign: Where the direction goes: `A` (the paper's, B stays 0), `B` (A is 0), or `both`: the adapter
            begins as the best approximation of what the preheat learnt, which is no longer HRP.
        a_scale: Length of a row of A (a column of B with `assign: B`): `orthonormal` is 1, `kaiming` is 0.577
            as PEFT's own rows have on average, or a number.
        rank_energy: Ranks are shared out anew between layers by the energy of their spectra, none above this
            many times its own; their sum stays. Off by default.
        count_preheat: The preheat's steps are part of the run's steps, so that runs with and without cost the
            same.
        force: Allow a preheat rank that is no larger than the adapter's.
        seed: Decides what A begins with.
    """

    preheat_rank: int | dict[str, int] | None = None
    preheat_steps: int | None = None
    preheat_lr: float | None = None
    trainable: Literal["both", "B"] = "both"
    preheat_a: Literal["orthonormal", "kaiming"] = "orthonormal"
    preheat_scale: Literal["rank_stabilized", "same"] | float = "rank_stabilized"
    preheat_optimizer: Literal["adamw", "sgd"] | Callable[[list[Any]], Any] = "adamw"
    assign: Literal["A", "B", "both"] = "A"
    a_scale: Literal["orthonormal", "kaiming"] | float = "orthonormal"
    rank_energy: float | None = None
    count_preheat: bool = True
    force: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if name in _ALSO_NUMBERS and _number(value):
                _expect(name, value, 0 < value < math.inf, "a number above 0")
            elif name == "preheat_optimizer" and callable(value):
                continue
            elif value not in choices:
                more = " or a number" if name in _ALSO_NUMBERS else ""
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}{more}, got {value!r}"
                    f"{nearest(str(value), choices)}"
                )
        ranks = self.preheat_rank
        for rank in ranks.values() if isinstance(ranks, Mapping) else (ranks,):
            _expect("preheat_rank", rank, rank is None or _whole(rank), "a whole number of at least 1")
        for pattern in ranks if isinstance(ranks, Mapping) else ():
            _expect("preheat_rank", pattern, isinstance(pattern, str), "a mapping of patterns of names")
            try:
                re.compile(pattern)
            except re.error as wrong:
                raise InputError(f"preheat_rank: {pattern!r} is no regular expression: {wrong}") from wrong
        steps, rate = self.preheat_steps, self.preheat_lr
        _expect("preheat_steps", steps, steps is None or _whole(steps), "a whole number of at least 1")
        positive = rate is None or (_number(rate) and 0 < rate < math.inf)
        _expect("preheat_lr", rate, positive, "above 0 and finite")
        if rate is not None and callable(self.preheat_optimizer):
            raise InputError(
                f"preheat_lr has no effect on a preheat_optimizer of your own, got {rate}; leave it out, and "
                "give the optimiser its rate"
            )
        energy = self.rank_energy
        enough = energy is None or (_number(energy) and 1 <= energy < math.inf)
        _expect("rank_energy", energy, enough, "at least 1 and finite")
        for name in ("count_preheat", "force"):
            _expect(name, getattr(self, name), type(getattr(self, name)) is bool, "true or false")
        _expect("seed", self.seed, type(self.seed) is int, "a whole number")

    @classmethod
    def of(cls, options: HRPOptions | None = None, **fields: Any) -> HRPOptions:
        """`options` (or the defaults) with single fields replaced.

        Raises:
            InputError: a field that doesn't exist, or a value out of range; names it.
        """
        if options is not None and not isinstance(options, cls):
            raise InputError(
                f"options must be {cls.__name__}, got {type(options).__name__}; single fields may be given "
                "by name"
            )
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(
                    f"HRP: no option `{name}`{nearest(name, known) or ';'} known: {', '.join(known)}"
                )
        return dataclasses.replace(options, **fields) if options else cls(**fields)

    def steps_of(self, total: int | None) -> int:
        """Steps of the preheat of a run of `total` steps."""
        if self.preheat_steps is not None:
            return self.preheat_steps
        return STEPS if total is None else max(1, min(max(10, round(0.03 * total)), total // 5))

    def at_rate(self, rate: float | None) -> Self:
        """With the learning rate of a run, where none is given and the optimiser hasn't its own."""
        if self.preheat_lr is not None or callable(self.preheat_optimizer):
            return self
        return dataclasses.replace(self, preheat_lr=rate)

    @property
    def length(self) -> float:
        """`a_scale` as a number."""
        return {"orthonormal": 1.0, "kaiming": 3**-0.5}.get(self.a_scale, self.a_scale)  # type: ignore


_ALSO_NUMBERS = ("preheat_scale", "a_scale")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "trainable": ("both", "B"),
    "preheat_a": ("orthonormal", "kaiming"),
    "preheat_scale": ("rank_stabilized", "same"),
    "preheat_optimizer": ("adamw", "sgd"),
    "assign": ("A", "B", "both"),
    "a_scale": ("orthonormal", "kaiming"),
}


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """A LoRA adapter that a fine-tune trains in place of the weights.

    Attributes:
        rank: Rank of the change of each matrix.
        alpha: The change is multiplied with alpha / rank; by default alpha is the rank.
        dropout: Chance that an input of A is left out in a step.
        target: Modules that get an adapter: `all-linear` (all but the output), or names as PEFT takes them.
        rslora: Divide alpha by the square root of the rank.
        init: PEFT's `init_lora_weights`: `kaiming` (its default), `gaussian`, `orthogonal`, `pissa`,
            `pissa_niter_<n>`, `olora` or `eva`, which looks at `init_batches` batches.
        init_batches: Batches that `eva` looks at.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    init: str = "kaiming"
    init_batches: int = 16

    def __post_init__(self) -> None:
        _expect("rank", self.rank, _whole(self.rank), "a whole number of at least 1")
        alpha, dropout = self.alpha, self.dropout
        positive = alpha is None or (_number(alpha) and 0 < alpha < math.inf)
        _expect("alpha", alpha, positive, "above 0 and finite")
        _expect("dropout", dropout, _number(dropout) and 0 <= dropout < 1, "in 0..1, below 1")
        target = (self.target,) if isinstance(self.target, str) else self.target
        named = isinstance(target, list | tuple) and all(target) and all(isinstance(n, str) for n in target)
        _expect("target", self.target, bool(target) and named, "`all-linear` or names of modules")
        _expect("rslora", self.rslora, type(self.rslora) is bool, "true or false")
        _expect("init_batches", self.init_batches, _whole(self.init_batches), "at least 1")
        if self.init not in _INITS and not re.fullmatch(r"pissa_niter_[1-9]\d*", str(self.init)):
            raise InputError(
                f"init must be one of {', '.join(_INITS)} or pissa_niter_<n>, got {self.init!r}"
                f"{nearest(str(self.init), _INITS)}"
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise InputError(f"init: orthogonal needs an even rank, got {self.rank}")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def keeps_base(self) -> bool:
        """Whether the adapter stands on the base as it is; some starts take their part out of the weights."""
        return not self.init.startswith(("pissa", "olora"))


_INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")


@dataclass(frozen=True, kw_only=True)
class HRPAdapterOptions(LoRAOptions, HRPOptions):
    """A LoRA adapter whose direction HRP finds before training."""

    def __post_init__(self) -> None:
        LoRAOptions.__post_init__(self)
        HRPOptions.__post_init__(self)
        if self.init != "kaiming":
            raise InputError(f"init: HRP is the start; found {self.init!r}, leave it out")
        rank = MOST_RANK if self.preheat_rank is None else self.preheat_rank
        if isinstance(rank, int) and rank <= self.rank and not self.force:
            found = "the default is" if self.preheat_rank is None else "got"
            raise InputError(
                f"preheat_rank must be above rank, which is {self.rank}, {found} {rank}; "
                "`force: true` allows it"
            )

    @property
    def hrp(self) -> HRPOptions:
        """HRP's own part."""
        return HRPOptions(**{f.name: getattr(self, f.name) for f in dataclasses.fields(HRPOptions)})


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, got {value!r}")
