"""Options of N:M pruning. Nothing here imports torch: recipes read it to check a page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

from weightsmith.checkpoints.masks import masks_file
from weightsmith.compression.nm.pattern import Pattern
from weightsmith.errors import InputError, nearest

PACKED_FILE, PACKED_FACTS = "weightsmith/semi_structured.safetensors", "weightsmith/semi_structured.json"
"""Where it keeps matrices that are packed for sparse tensor cores, and what they were packed by."""
Export = Literal["dense", "semi-structured"]
"""What is written: dense tensors with zeros, or these and the packed matrices beside them."""


@dataclass(frozen=True, kw_only=True)
class NMOptions:
    """What all ways to prune have.

    Attributes:
        pattern: N:M, the number of weights KEPT of each M consecutive inputs.
        targets: Patterns of the modules to prune; all linear layers where none is given, and of a model that
            also reads images or sound those in the layers of its text decoder: calibration is by text, so
            the others need `magnitude`. A pattern is a glob over whole parts of a name: `q_proj`, `layers.0`,
            `layers.*.mlp`, `vision_tower`.
        ignore: Patterns of modules and stacks to leave dense. The output layer and routers stay dense in any
            case, routers unless `targets` names them themselves.
        experts: Patterns of parameters that stack matrices, with the axis of their inputs: the layouts of
            models differ, and a shape doesn't tell. No method sees the inputs of each expert, so they need
            `magnitude`, or `maskpro` with an `init` of magnitude or masks.
        remainder: What to do with a matrix whose inputs don't divide by M: `error`, or leave it `dense`.
    """

    pattern: str = "2:4"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ("lm_head",)
    experts: dict[str, int] = field(default_factory=dict)
    remainder: Literal["error", "dense"] = "error"

    kind: ClassVar[str]
    statistics: ClassVar[Literal["none", "norms", "hessian"]] = "none"
    """What is measured of each layer's inputs."""

    def __post_init__(self) -> None:
        Pattern.of(self.pattern)
        for name in ("targets", "ignore"):
            given = getattr(self, name)
            expect(name, given, not isinstance(given, str), "a list of patterns")
            object.__setattr__(self, name, tuple(given))
        for pattern, axis in self.experts.items():
            expect(f"experts: {pattern}", axis, axis in (1, 2, -1, -2), "the axis of the inputs, 1 or 2")
        one_of("remainder", self.remainder, ("error", "dense"))

    @property
    def nm(self) -> Pattern:
        """The pattern, read."""
        return Pattern.of(self.pattern)


@dataclass(frozen=True, kw_only=True)
class MagnitudeOptions(NMOptions):
    """Keep the largest weights."""

    kind: ClassVar[str] = "magnitude"


@dataclass(frozen=True, kw_only=True)
class WandaOptions(NMOptions):
    """Keep weights that are large where their inputs are."""

    kind: ClassVar[str] = "wanda"
    statistics: ClassVar[Literal["none", "norms", "hessian"]] = "norms"


@dataclass(frozen=True, kw_only=True)
class RIAOptions(NMOptions):
    """Wanda relative to rows and columns.

    Attributes:
        power: Of the inputs' norms.
    """

    power: float = 0.5

    kind: ClassVar[str] = "ria"
    statistics: ClassVar[Literal["none", "norms", "hessian"]] = "norms"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect("power", self.power, 0 <= self.power < math.inf, "at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class SparseGPTOptions(NMOptions):
    """Prune column by column, later columns make up for it.

    Attributes:
        block_size: Columns after which the rest of a matrix is updated at once, a multiple of M; None takes
            128, or the multiple of M below it.
        damp: Share of the mean diagonal that is added to the diagonal.
        update: Keep the updated weights; otherwise only their mask is taken, of the weights as they were.
    """

    block_size: int | None = None
    damp: float = 0.01
    update: bool = True

    kind: ClassVar[str] = "sparsegpt"
    statistics: ClassVar[Literal["none", "norms", "hessian"]] = "hessian"

    def __post_init__(self) -> None:
        super().__post_init__()
        m = self.nm.m
        size = self.block_size
        expect("block_size", size, size is None or (_whole(size) and size % m == 0), f"a multiple of {m}")
        expect("damp", self.damp, 0 <= self.damp < math.inf, "at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class SparseSwapsOptions(NMOptions):
    """Exchange kept and pruned weights of a one-shot mask as long as outputs come closer to the dense ones.

    Attributes:
        init: The mask to begin with: `magnitude`, `wanda` or `ria`.
        sweeps: Most passes over a matrix; it ends earlier where no swap helps.
    """

    init: Literal["magnitude", "wanda", "ria"] = "wanda"
    sweeps: int = 20

    kind: ClassVar[str] = "sparseswaps"
    statistics: ClassVar[Literal["none", "norms", "hessian"]] = "hessian"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("init", self.init, ("magnitude", "wanda", "ria"))
        expect("sweeps", self.sweeps, _whole(self.sweeps), "a whole number of at least 1")


@dataclass(frozen=True, kw_only=True)
class MaskProConfig(NMOptions):
    """Learn which weights to keep, by forward passes alone.

    Attributes:
        init: The mask to begin with: `magnitude`, `wanda`, `ria`, `sparseswaps`, `sparsegpt` (its mask
            alone), or the folder or file of masks.
        init_scale: Logit C of a weight that the first mask keeps, 0 of the others; `auto` takes the one at
            which `change_rate` of all groups differ from the first mask in a sample.
        change_rate: That share; None goes by the number of groups, 0.05 up to thousands, 1e-3 at a million,
            1e-4 at 10⁹.
        lr: η; `auto` takes 0.1 / (standard deviation of the residual) after `warmup` steps.
        warmup: Steps that only measure the residual where `lr` is `auto`; they are part of `steps`.
        alpha: Decay of the tracker δ.
        steps: Masks that are tried one after another.
        samples_per_step: Masks drawn in a step; the step goes along the mean of their updates.
        score: Gradient of the log-probability of the drawn `set`, or of its order (`ordered`, cheaper where
            many are kept, and noisier); `auto` is `set` for N up to 4.
        estimator: What multiplies the score: the residual less its tracker (`tracked`, the paper's), the
            `residual`, the loss less its tracker (`baseline`), or the plain `loss`.
        reference: How the reference mask's loss on a batch is known: `cached` for batches that come again,
            or `online`, by one more forward pass a step.
        refresh_reference: Make the likeliest mask the reference when the loss has halved.
        first_mask: What the first step tries: a `sample`, or the first mask itself (`init`), as published
            code does.
        certainty: Change a group's mask only where its logits moved by more than so many standard deviations
            of what noise alone moves them; 0 takes the largest logits, as the paper does. Ours, experimental:
            3 held a run that was short for its groups near its first mask, and kept back some of a long
            one's gain.
        keep: What comes out where the learnt mask has a larger loss on the data than the first one: the
            `better` of the two, or what was `learnt`. Ours; the paper keeps what was learnt.
        repair: Complete first masks from a file whose groups don't keep exactly N.
        seed: Decides all masks; 0 by default, in a recipe what follows from its seed and the stage's name.
    """

    init: str = "wanda"
    init_scale: float | Literal["auto"] = 10.0
    change_rate: float | None = None
    lr: float | Literal["auto"] = 50.0
    warmup: int = 200
    alpha: float = 0.99
    steps: int = 10_000
    samples_per_step: int = 1
    score: Literal["auto", "set", "ordered"] = "auto"
    estimator: Literal["tracked", "residual", "baseline", "loss"] = "tracked"
    reference: Literal["cached", "online"] = "cached"
    refresh_reference: bool = True
    first_mask: Literal["sample", "init"] = "sample"
    certainty: float = 0.0
    keep: Literal["better", "learnt"] = "better"
    repair: bool = False
    seed: int | None = None

    kind: ClassVar[str] = "maskpro"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            one_of(name, getattr(self, name), choices)
        for name in ("steps", "samples_per_step"):
            expect(name, getattr(self, name), _whole(getattr(self, name)), "a whole number of at least 1")
        expect(
            "warmup", self.warmup, _whole(self.warmup) and self.warmup >= 2, "a whole number of at least 2"
        )
        for name, most in (("lr", sys.float_info.max), ("init_scale", LARGEST_LOGIT)):
            value = getattr(self, name)
            right = value == "auto" or (_number(value) and 0 < value <= most)
            expect(name, value, right, f"auto, or above 0 and at most {most:g}")
        rate = self.change_rate
        expect("change_rate", rate, rate is None or (_number(rate) and 0 < rate < 1), "in 0..1")
        sure = _number(self.certainty) and 0 <= self.certainty < math.inf
        expect("certainty", self.certainty, sure, "at least 0 and finite")
        expect("alpha", self.alpha, 0 <= self.alpha < 1, "in 0..1, below 1")
        if self.lr == "auto" and self.warmup >= self.steps:
            raise InputError(
                f"warmup must be below steps ({self.steps}), got {self.warmup}; or give lr a number"
            )

    @property
    def masks(self) -> Path | None:
        """The file whose masks `init` begins with; None where it names a method."""
        return None if self.init in KINDS and self.init != self.kind else masks_file(self.init)

    @property
    def compares(self) -> bool:
        """Whether losses are taken against those of the reference mask."""
        return self.estimator in ("tracked", "residual")

    @property
    def ordered(self) -> bool:
        """Whether the score is that of the order."""
        return self.score == "ordered" or (self.score == "auto" and self.nm.n > 4)

    def scale_for(self, groups: int) -> float:
        """C: with it a share ρ of all groups differ from the first mask in a sample.

        To first order (M - N) H_N exp(-C) of them do, H_N = 1 + 1/2 + ... + 1/N: 3 exp(-C) for 2:4.
        """
        if self.init_scale != "auto":
            return float(self.init_scale)
        n, m = self.nm.n, self.nm.m
        rate = change_rate(groups) if self.change_rate is None else self.change_rate
        return math.log((m - n) * sum(1 / k for k in range(1, n + 1)) / rate)


LARGEST_LOGIT = 40.0
"""Logits stay within ± this: exp(-80) is still a normal number of float32."""

_RATES = ((5e3, 0.05), (1e6, 1e-3), (1e9, 1e-4))


def change_rate(groups: int) -> float:
    """The share of groups to change in a sample, by how many there are: straight lines in logarithms."""
    if groups <= _RATES[0][0]:
        return _RATES[0][1]
    for (low, high_rate), (high, low_rate) in pairwise(_RATES):
        if groups <= high:
            part = math.log(groups / low) / math.log(high / low)
            return high_rate * (low_rate / high_rate) ** part
    return _RATES[-1][1]


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "score": ("auto", "set", "ordered"),
    "estimator": ("tracked", "residual", "baseline", "loss"),
    "reference": ("cached", "online"),
    "first_mask": ("sample", "init"),
    "keep": ("better", "learnt"),
}

KINDS: Mapping[str, type[NMOptions]] = {
    cls.kind: cls
    for cls in (
        MagnitudeOptions,
        WandaOptions,
        RIAOptions,
        SparseGPTOptions,
        SparseSwapsOptions,
        MaskProConfig,
    )
}
"""The ways to prune by their names."""


def expect(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise the error of an option unless `holds`."""
    if not holds:
        raise InputError(f"{name} must be {expected}, got {value!r}")


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise the error of an option unless it is one of `choices`."""
    if value not in choices:
        raise InputError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}"
        )


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
