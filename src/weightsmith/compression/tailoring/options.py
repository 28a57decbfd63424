"""What a search for a tailored model can be told: the schema of recipes and of the Python class alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from weightsmith.compression.tailoring.space import grid
from weightsmith.errors import InputError

Edge = Literal["follow", "base", "mean"]
Compat = Literal["own", "repo"]
Choice = Literal["mean", "scaled_mean", "chebyshev"]
Optimizer = Literal["evolution", "optuna", "smac", "random"]
OPTIMIZERS: tuple[Optimizer, ...] = ("evolution", "optuna", "smac", "random")
EDGES: tuple[Edge, ...] = ("follow", "base", "mean")
CHOICES: tuple[Choice, ...] = ("mean", "scaled_mean", "chebyshev")
METHOD = "task_arithmetic"
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
}
"""What the fields of each annotation may hold."""


@dataclass(frozen=True, kw_only=True)
class TailorOptions:
    """How a model is searched for."""

    sparsity: float | None = None
    """Share s of the l layers to drop, 0 <= s < 1: R = ceil(l s). Or give `keep_layers`."""
    keep_layers: int | None = None
    """Layers to keep, 1..l."""
    n_trials: int = 500
    """Configurations measured, at whatever budget; repeats cost nothing and don't count."""
    min_budget: int = 100
    """Calibration examples of each task at the lowest rung, at least."""
    max_budget: int = 1000
    """Calibration examples of each task at the highest rung."""
    eta: int = 3
    """One of so many goes on to the next rung, which has so many times the examples."""
    optimizer: Optimizer = "evolution"
    """`evolution`, `optuna` (extra `search`) or `random` within Hyperband brackets; `smac` as the paper has
    it (extra `smac`)."""
    merge_methods: tuple[str, ...] = (METHOD,)
    """How layers of several fine-tunes are blended; empty allows one source a layer only."""
    lambda_range: tuple[float, float] = (0.0, 1.0)
    """Least and largest weight of a blend."""
    edge: Edge = "follow"
    """Tensors outside of the layers: `follow` the first kept layer (embeddings) and the last one (norm,
    output), always `base`, or the `mean` of the fine-tunes."""
    seeds: Literal["all", "paper"] = "all"
    """`all` adds to the paper's starts each model alone without its layers of least block influence."""
    start_share: float = 0.3
    """Share of the trials that starts may take."""
    select: Choice = "mean"
    """Which plan of the Pareto set is reported: that of the least mean cost over tasks, or of the least mean
    or largest of costs scaled by the bounds seen. Where `smac` is not asked, the search looks for it too."""
    rho: float = 0.05
    """Weight of the sum in ParEGO's norm."""
    early_stop: bool = True
    """Give a trial up while it is scored, once it can neither go on nor be chosen even if all the rest were
    right."""
    generation: int = 8
    """Configurations of a bracket where there is one rung only; asked at once of `smac`."""
    max_failures: int = 5
    """Trials that may fail by one kind of error before the search gives up."""
    blend_cache_bytes: int = 1 << 30
    """Blended layers that are kept, in bytes."""
    prefix_cache_bytes: int = 512 << 20
    """Activations after the first layers that are kept, in bytes; 0 computes them always."""
    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            word, _, missing = str(entry.type).partition(" | ")
            value = getattr(self, entry.name)
            if word not in _KINDS or (missing and value is None):
                continue
            kinds, wanted = _KINDS[word]
            # To Python `True` is a number, too.
            if not isinstance(value, kinds) or (isinstance(value, bool) and word != "bool"):
                raise InputError(f"{entry.name}: {value!r}, expected {wanted}")
        for name in ("n_trials", "min_budget", "max_budget", "generation", "max_failures"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, expected at least 1")
        if self.min_budget > self.max_budget:
            raise InputError(f"min_budget: {self.min_budget}, expected at most max_budget {self.max_budget}")
        if self.eta < 2:
            raise InputError(f"eta: {self.eta}, expected at least 2")
        words = {"optimizer": OPTIMIZERS, "edge": EDGES, "seeds": ("all", "paper"), "select": CHOICES}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}: {getattr(self, name)!r}, expected {', '.join(known)}")
        for method in self.merge_methods:
            if method != METHOD:
                raise InputError(f"merge_methods: {method!r}, expected {METHOD}")
        if not 0 < self.start_share <= 1 or not math.isfinite(self.rho) or self.rho < 0:
            raise InputError(f"start_share {self.start_share}, rho {self.rho}: expected 0..1 and 0 or more")
        try:
            first, last = grid(*map(float, self.lambda_range))
        except (TypeError, ValueError, OverflowError):
            first, last = 1, 0
        if first > last:
            raise InputError(f"lambda_range: {self.lambda_range}, expected (least, largest), in thousandths")

    def rungs(self, largest: int | None = None) -> tuple[int, ...]:
        """Budgets from the lowest to the highest rung, each once.

        Args:
            largest: Examples that there are, where they are fewer than `max_budget`.

        Example:
            >>> TailorOptions(sparsity=0.25).rungs()
            (111, 333, 1000)
        """
        high = min(self.max_budget, largest or self.max_budget)
        low = min(self.min_budget, high)
        found = [high]
        while found[-1] / self.eta >= low and len(found) < 64:
            found.append(high / self.eta ** len(found))
        return tuple(dict.fromkeys(max(1, int(budget)) for budget in reversed(found)))
