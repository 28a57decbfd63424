"""The options of Mediator: how conflict is measured, what is routed, how experts are kept, how they are
chosen.

The paper's equations are not public (arXiv:2502.04411; what is certain of it is said in
`docs/methods/mediator.md`), so each choice is an option whose default is our reconstruction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from weightsmith.errors import InputError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?)[bB]?\s*")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a request finds its experts."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    feature: Literal["hidden", "last_token", "embedding", "text"] = "hidden"
    """What the router sees of a prompt: the `hidden` state after a block, mean over its tokens; that of the
    `last_token`; the mean input `embedding`; hashed n-grams of its `text`, which cost no pass of the
    model."""
    layer: int | None = None
    """Blocks that are run for `hidden` and `last_token`; half of them, rounded up, by default."""
    hidden: int = 0
    """Width of a hidden layer of the classifier; 0 is plain logistic regression."""
    l2: float = 1e-2
    """Strength of the L2 penalty on the classifier's weights."""
    iterations: int = 200
    """Steps of L-BFGS."""
    uncertainty: Literal["entropy", "max_prob"] = "entropy"
    """What is compared with `u_lo`, both in 0 .. 1: the entropy of the probabilities, or one less the
    largest."""
    u_lo: float = 0.2
    """Below this uncertainty one expert answers alone."""
    w_min: float = 0.05
    """Shares of a blend below this are set to 0 and the rest scaled up."""
    ood: Literal["prior", "p", "dense"] = "prior"
    """What answers a prompt unlike all training prompts: all experts evenly (`prior`), a blend by the
    router's probabilities (`p`), or the `dense` part alone."""
    ood_quantile: float = 0.99
    """Share of the training prompts that must not count as unlike."""
    shrinkage: float = 0.1
    """Share of the identity in the covariance behind the distance to the known tasks."""
    text_features: int = 1024
    """Buckets of hashed n-grams for `feature: text`."""

    def __post_init__(self) -> None:
        _check("l2", self.l2, 0, None, open_low=False)
        _check("u_lo", self.u_lo, 0, 1, open_low=False)
        _check("w_min", self.w_min, 0, 1, open_low=False)
        _check("ood_quantile", self.ood_quantile, 0, 1)
        _check("shrinkage", self.shrinkage, 0, 1)
        for name, least in (("iterations", 1), ("hidden", 0), ("text_features", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.layer is not None and self.layer < 0:
            raise InputError(f"layer: expected a number of blocks, 0 or more, got {self.layer}")


@dataclass(frozen=True, kw_only=True)
class MediatorConfig:
    """How fine-tunes become one averaged model with routed blocks."""

    conflict: Literal["pairwise_sign", "any_sign", "signed_mass", "cosine"] = "pairwise_sign"
    """How a block's conflict is measured: the share of opposite signs over pairs of fine-tunes, or over all
    of them at once (whose level by chance grows with their number); the share of the changes' mass that a sum
    cancels; half of one less the mean cosine."""
    denominator: Literal["overlap", "all"] = "overlap"
    """What the two counts of signs are shares of: entries that (two) fine-tunes both change, or all
    entries."""
    denoise_density: float = 0.2
    """Share of each tensor's changes, the largest ones, that conflict is measured on; 1 for all of them."""
    z: float = 0.0
    """Blocks whose conflict lies more than `z` standard deviations above the mean are routed."""
    max_routed: int | None = None
    """Most blocks routed by `z`; half of them by default."""
    n_routed: int | None = None
    """Route exactly so many blocks, the highest conflict first, instead."""
    threshold: float | None = None
    """Route all blocks with more conflict than this instead."""
    memory_budget: int | str | None = None
    """Route as many blocks as fit into so many bytes (`10GB`) instead, the highest conflict first."""
    route_head: bool = False
    """Treat the output projection as a routed block; a tied one is untied."""
    average: str = "linear"
    """The merge method of everything that is not routed."""
    average_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of that method."""
    dense: Literal["base", "mean"] = "base"
    """What a routed block keeps whole: the base, or the mean of the fine-tunes."""
    expert_density: float = 0.1
    """Share of a routed tensor's entries in which an expert differs from the dense part."""
    select: Literal["magnitude", "random"] = "magnitude"
    """Which entries those are; `random` divides the kept ones by the density, as DARE does."""
    rescale: Literal["none", "l1"] = "none"
    """`l1` gives what is kept the L1 norm of the whole change."""
    max_rel_err: float | None = None
    """Raise a tensor's density until no more than this share of the change's norm is lost."""
    layout: Literal["auto", "bitmap", "csr", "dense"] = "auto"
    """How kept entries are stored; `auto` takes the smallest for each tensor."""
    values: Literal["stored", "int8"] = "stored"
    """Numbers of kept entries: in the model's own type, or in one byte with a scale for each row."""
    seed: int = 0
    """Of `select: random`."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How a request finds its experts."""

    def __post_init__(self) -> None:
        _check("denoise_density", self.denoise_density, 0, 1)
        _check("expert_density", self.expert_density, 0, 1)
        if self.max_rel_err is not None:
            _check("max_rel_err", self.max_rel_err, 0, 1)
        rules = [
            name for name in ("n_routed", "threshold", "memory_budget") if getattr(self, name) is not None
        ]
        if len(rules) > 1:
            raise InputError(f"{rules[1]}: `{rules[0]}` chooses the routed blocks already; give one of them")
        for name in ("n_routed", "max_routed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name}: expected 0 or more blocks, got {value}")
        if self.threshold is not None:
            _check("threshold", self.threshold, 0, 1, open_low=False)
        if self.select == "random" and self.rescale != "none":
            raise InputError("rescale: `select: random` divides by the density already; expected `none`")
        if self.select == "random" and self.max_rel_err is not None:
            raise InputError("max_rel_err: needs `select: magnitude`")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)


def parse_bytes(size: int | str) -> int:
    """Bytes of a number or of words such as `10GB`, `512 MiB`.

    Raises:
        InputError: it is no such size.
    """
    if isinstance(size, int):
        if size < 0:
            raise InputError(f"memory_budget: expected a number of bytes, got {size}")
        return size
    found = _SIZE.fullmatch(size)
    if not found:
        raise InputError(f"memory_budget: expected bytes such as `10GB` or `512MiB`, got `{size}`")
    number, letter, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[letter.lower()])


def _check(name: str, value: float, low: float, high: float | None, *, open_low: bool = True) -> None:
    inside = (value > low if open_low else value >= low) and (high is None or value <= high)
    if not inside:
        bounds = f"{'(' if open_low else '['}{low}, {'inf)' if high is None else f'{high}]'}"
        raise InputError(f"{name}: expected a number in {bounds}, got {value}")
