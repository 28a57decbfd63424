"""Options of AdaGC. Nothing here imports torch: recipes read it to check a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weightsmith.errors import InputError, nearest

if TYPE_CHECKING:
    from weightsmith.training.adagc.callback import AdaGCCallback


SHORT_RUN = 5000
"""Steps below which gamma seeded with the minimum does not recover: it climbs 0.1 % a step at most."""


@dataclass(frozen=True, kw_only=True)
class AdaGCOptions:
    """How AdaGC clips; the defaults are the paper's.

    Attributes:
        lambda_rel: A tensor is clipped at `lambda_rel` times the running mean of its own clipped norms.
        beta: Decay of that running mean.
        lambda_abs: Global norm to which all gradients together are clipped during warm-up.
        warmup_steps: Steps of global clipping that seed the running means.
        init: How they are seeded: the smallest norm seen in warm-up, a running mean from the first step on,
            or the last norm. `min` needs thousands of steps to recover; short runs want `ema`.
        eps: Added to norms that divide.
        granularity: What has a norm of its own: each tensor, this process's shard of it, or all gradients
            together.
        nonfinite: What a gradient with NaN or infinity becomes: zero, or an error.
        max_consecutive_nonfinite: Steps in a row that one tensor may be non-finite before an error.
        gamma_min: Lower bound of the running means.
        exclude: Patterns of names (`*norm*`) that keep out of the per-tensor rule.
        exclude_mode: Excluded tensors stay under global clipping all along, or are never clipped.
        stacked: Patterns of names and the axis along which those parameters stack independent tensors
            (`"*.experts.*": 0`), each clipped by itself.
    """

    lambda_rel: float = 1.05
    beta: float = 0.98
    lambda_abs: float = 1.0
    warmup_steps: int = 100
    init: Literal["min", "ema", "last"] = "min"
    eps: float = 1e-6
    granularity: Literal["tensor", "shard", "global"] = "tensor"
    nonfinite: Literal["zero", "error"] = "zero"
    max_consecutive_nonfinite: int = 10
    gamma_min: float = 0.0
    exclude: tuple[str, ...] = ()
    exclude_mode: Literal["global", "none"] = "global"
    stacked: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.lambda_rel > 0, "lambda_rel", "> 0", self.lambda_rel, "values < 1 shrink every gradient")
        _check(0 <= self.beta < 1, "beta", "in [0, 1)", self.beta)
        _check(self.lambda_abs > 0, "lambda_abs", "> 0", self.lambda_abs)
        whole = type(self.warmup_steps) is int and self.warmup_steps >= 0
        _check(whole, "warmup_steps", "a whole number >= 0", self.warmup_steps)
        _check(0 <= self.eps < math.inf, "eps", ">= 0", self.eps)
        _check(0 <= self.gamma_min < math.inf, "gamma_min", ">= 0", self.gamma_min)
        limit = self.max_consecutive_nonfinite
        _check(type(limit) is int and limit >= 1, "max_consecutive_nonfinite", "a whole number >= 1", limit)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            hint = nearest(str(value), choices)
            _check(value in choices, name, f"one of {', '.join(choices)}", repr(value), hint.lstrip("; "))
        if isinstance(self.exclude, str):
            raise InputError(f"exclude must be a list of patterns, got the text {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "stacked", dict(self.stacked))
        if self.granularity == "global" and self.stacked:
            raise InputError(
                "stacked has no meaning with granularity global: there is one norm for everything"
            )

    @classmethod
    def author_code(cls, **changes: Any) -> AdaGCOptions:
        """The defaults of the authors' code, which differ from the paper's: 1.04 and 0.99."""
        return cls.of({"lambda_rel": 1.04, "beta": 0.99, **changes})

    @classmethod
    def of(cls, options: AdaGCOptions | Mapping[str, Any] | None = None, **fields: Any) -> AdaGCOptions:
        """`options` (or the defaults) with single fields replaced.

        Raises:
            InputError: a field that doesn't exist, or a value out of range; names it.
        """
        if isinstance(options, Mapping):
            fields = {**options, **fields}
            options = None
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(
                    f"AdaGC: no option `{name}`{nearest(name, known) or ';'} known: {', '.join(known)}"
                )
        return dataclasses.replace(options, **fields) if options else cls(**fields)

    def callback(self) -> AdaGCCallback:
        """The Trainer callback with these options."""
        from weightsmith.training.adagc.callback import AdaGCCallback

        return AdaGCCallback(**dataclasses.asdict(self))


_CHOICES = {
    "init": ("min", "ema", "last"),
    "granularity": ("tensor", "shard", "global"),
    "nonfinite": ("zero", "error"),
    "exclude_mode": ("global", "none"),
}


def _check(good: bool, name: str, wanted: str, got: object, more: str = "") -> None:
    if not good:
        raise InputError(f"{name} must be {wanted}, got {got}" + (f"; {more}" if more else ""))
