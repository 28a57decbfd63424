"""What was chosen, and the rules that choose without looking at a loss. Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.errors import InputError
from weightsmith.training.averaging.options import AveragingOptions, check_select


@dataclass(frozen=True)
class Selection:
    """The candidates that are averaged.

    Attributes:
        method: How they were chosen.
        steps: The training step of every candidate, oldest first.
        weights: Weight of each candidate, summing to 1; 0 for those left out.
        losses: Mean loss of what was measured, by name.
        scores: What the method thinks of each candidate: SeWA's keep probabilities, losses alone; or empty.
        history: Loss at each iteration of a learned choice.
        cost: Passes made: forward, backward, reads (of a candidate).
    """

    method: str
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    losses: dict[str, float] = field(default_factory=dict)
    scores: tuple[float, ...] = ()
    history: tuple[float, ...] = ()
    cost: dict[str, int] = field(default_factory=dict)

    @property
    def indices(self) -> tuple[int, ...]:
        """Positions of the candidates that are averaged."""
        return tuple(index for index, weight in enumerate(self.weights) if weight > 0)

    @property
    def chosen_steps(self) -> tuple[int, ...]:
        """Training steps of the candidates that are averaged."""
        return tuple(self.steps[index] for index in self.indices)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {
            "method": self.method,
            "steps": list(self.steps),
            "weights": list(self.weights),
            "chosen_steps": list(self.chosen_steps),
            "losses": self.losses,
            "scores": list(self.scores),
            "history": list(self.history),
            "cost": self.cost,
        }


def mean_of(method: str, steps: Sequence[int], indices: Sequence[int], **facts: Any) -> Selection:
    """The uniform mean of the candidates at `indices`."""
    chosen = set(indices)
    weights = tuple(1 / len(chosen) if index in chosen else 0.0 for index in range(len(steps)))
    return Selection(method, tuple(steps), weights, **facts)


def by_rule(options: AveragingOptions, steps: Sequence[int]) -> Selection:
    """The choice of a rule: uniform, lawa, every, random; and swa or ema over the candidates.

    Args:
        options: `method`, `num_select`, `decay` and `seed` count.
        steps: Training steps of the candidates, oldest first.

    Raises:
        InputError: fewer candidates than are to be chosen, or a method that needs a loss.
    """
    method, number = options.method, len(steps)
    if number == 0:
        raise InputError("there are no candidates to average")
    if method in ("uniform", "swa"):
        return mean_of(method, steps, range(number))
    if method == "ema":
        decay = options.decay
        weights = [decay ** (number - 1)] + [
            (1 - decay) * decay ** (number - 1 - i) for i in range(1, number)
        ]
        return Selection(method, tuple(steps), tuple(weights))
    if method not in ("lawa", "every", "random"):
        raise InputError(f"{method} needs a model and data to measure a loss on")
    select = options.num_select
    assert isinstance(select, int)
    check_select(select, number)
    if method == "lawa":
        return mean_of(method, steps, range(number - select, number))
    if method == "every":
        # The last one, and back from it in even steps.
        return mean_of(method, steps, [number - 1 - (i * number) // select for i in range(select)])
    return mean_of(method, steps, random.Random(options.seed).sample(range(number), select))
