"""Several tasks as one number, and the choice among plans that no other plan beats on all of them.

    f_t     cost of task t on the calibration examples, 1 - score, in [0, 1]
    F(w)    max_t w_t g_t + rho sum_t w_t g_t,  g_t = f_t scaled to [0, 1] by the bounds seen so far

Source  ParEGO (Knowles, 2006) as arXiv:2506.20480 uses it; rho is SMAC's default, the paper's was not visible
        to us. The choice of the one reported plan is ours: least mean cost; of equal ones the one with fewer
        blends, then the earlier trial. Scaled costs would weigh a task the more, the less its costs differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from weightsmith.compression.tailoring.trials import Trial
from weightsmith.errors import InputError

RHO = 0.05
_REPORTED = 0.6

Costs = Sequence[float]
Bounds = Sequence[tuple[float, float]]
Aim = Callable[[Costs], float]
"""From the costs of a configuration to the number that is to be small."""
Select = Literal["mean", "scaled_mean", "chebyshev"] | Callable[[Sequence[Trial]], int]


def bounds(costs: Sequence[Costs]) -> list[tuple[float, float]]:
    """Least and largest cost of each task."""
    return [(min(column), max(column)) for column in zip(*costs, strict=True)]


def scaled(costs: Costs, limits: Bounds) -> list[float]:
    """Costs scaled by their bounds; 0 where all have the same."""
    return [
        (cost - low) / (high - low) if high > low else 0.0
        for cost, (low, high) in zip(costs, limits, strict=True)
    ]


def parego(costs: Costs, weights: Sequence[float], limits: Bounds, rho: float = RHO) -> float:
    """F: the augmented Chebyshev norm of scaled costs.

    Example:
        >>> parego([0.5, 0.2], [0.4, 0.6], [(0.0, 1.0), (0.0, 0.4)], rho=0.05)
        0.325
    """
    weighted = [weight * cost for weight, cost in zip(weights, scaled(costs, limits), strict=True)]
    return max(weighted) + rho * sum(weighted)


def size(costs: Costs, limits: Bounds, select: str) -> float:
    """What `select` compares plans by."""
    values = list(costs) if select == "mean" else scaled(costs, limits)
    return max(values) if select == "chebyshev" else sum(values) / len(values)


def draw_aim(rng: random.Random, limits: Bounds, select: Select, rho: float = RHO) -> Aim:
    """What to look for next: in three draws of five what the reported plan is chosen by, else ParEGO's norm
    with weights drawn anew, so that the rest of the Pareto set is not forgotten.

    Args:
        rng: Decides.
        limits: Bounds of the costs so far.
        select: As in `choose`; where it is a function, nothing is known of it but the Pareto set.
        rho: Of ParEGO's norm.
    """
    if not callable(select) and rng.random() < _REPORTED:
        return lambda costs: size(costs, limits, select)
    weights = simplex(rng, len(limits))
    return lambda costs: parego(costs, weights, limits, rho)


def simplex(rng: random.Random, count: int) -> list[float]:
    """Weights drawn from Dirichlet(1)."""
    drawn = [rng.expovariate(1.0) for _ in range(count)]
    return [value / sum(drawn) for value in drawn]


def pareto(costs: Sequence[Costs]) -> list[int]:
    """Places of those that no other is as good as everywhere and better somewhere; of equal ones all."""
    # In lexical order a later one can't dominate an earlier one, so each is compared with survivors only.
    order = sorted(range(len(costs)), key=lambda place: tuple(costs[place]))
    front: list[int] = []
    for place in order:
        if not any(_dominates(costs[other], costs[place]) for other in front):
            front.append(place)
    return sorted(front)


def choose(trials: Sequence[Trial], select: Select = "mean") -> Trial:
    """The trial to report, out of the Pareto set of `trials` (of one budget).

    Args:
        trials: Finished trials.
        select: Least "mean" of the costs, least "scaled_mean", or least "chebyshev" (the largest scaled
            cost); or a function from the Pareto set to a place in it.

    Raises:
        InputError: an unknown word, or a place that is not there.
    """
    costs = [list(trial.costs.values()) for trial in trials]
    limits = bounds(costs)
    front = [trials[place] for place in pareto(costs)]
    if callable(select):
        place = select(front)
        if place not in range(len(front)):
            raise InputError(f"select: returned {place!r}, expected a place in 0..{len(front) - 1}")
        return front[place]
    if select not in ("mean", "scaled_mean", "chebyshev"):
        raise InputError(f"select: {select!r}, expected mean, scaled_mean, chebyshev or a function")

    def rank(trial: Trial) -> tuple[float, int, int]:
        # Sums of equal costs in another order may differ in the last bit.
        found = round(size(list(trial.costs.values()), limits, str(select)), 12)
        return found, trial.configuration.num_merged, trial.id

    return min(front, key=rank)


def _dominates(one: Costs, other: Costs) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
