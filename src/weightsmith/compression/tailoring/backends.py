"""Who decides what is tried next: one protocol, ask and tell, over configurations and budgets.

Racing    Hyperband: brackets s = s_max .. 0 of n0 = ceil((s_max + 1) / (s + 1) eta^s) configurations; each
          rung keeps the best 1/eta by ParEGO's norm with weights drawn anew, and gives them eta times the
          examples. Who fills a bracket is a sampler: `evolution`, `random`, or Optuna's TPE.
SMAC      has brackets and scalarisation of its own: the paper's setting, `smac.py`.

What is asked depends on the seed and on what was told, never on how many workers there are or who is first.

Source  arXiv:2506.20480 (SMAC3 with Hyperband and ParEGO); Hyperband: arXiv:1603.06560. Ours: the best starts
        go through the first bracket, so that a good one is measured at every budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightsmith.compression.tailoring.objective import RHO, bounds, parego, pareto, scaled, simplex
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.trials import Trial

_STALE_ROUNDS = 20
"""Rounds of brackets in a row that ask for nothing new, after which there is nothing new to find."""


@dataclass(frozen=True, slots=True)
class Request:
    """A configuration to measure, and the examples of each task to do it with.

    Attributes:
        configuration: What to measure.
        budget: Examples of each task, at most.
        survivors: So many of what is asked beside it may go on; one that can't be among them need not be
            scored to its end. None where that isn't known.
    """

    configuration: Configuration
    budget: int
    survivors: int | None = None


class Backend(Protocol):
    """Decides what is tried."""

    def ask(self) -> list[Request]:
        """What is to be measured next, in order; nothing when there is nothing left."""
        ...

    def tell(self, trials: Sequence[Trial]) -> None:
        """The answers to all that was asked, in that order."""
        ...


class History:
    """Everything that was told.

    Attributes:
        trials: By configuration and budget.
    """

    def __init__(self) -> None:
        self.trials: dict[tuple[str, int], Trial] = {}

    def add(self, trials: Sequence[Trial]) -> bool:
        """Remember trials; whether one of them is new."""
        new = [trial for trial in trials if trial.key not in self.trials]
        self.trials.update((trial.key, trial) for trial in new)
        return bool(new)

    def has(self, configuration: Configuration, budget: int) -> bool:
        """Whether it was measured at this budget."""
        return (configuration.key, budget) in self.trials

    def limits(self) -> list[tuple[float, float]]:
        """Bounds of each task's cost."""
        return bounds([list(trial.costs.values()) for trial in self.trials.values()])

    def best(self, trials: Sequence[Trial], count: int, weights: Sequence[float], rho: float) -> list[Trial]:
        """The `count` of least norm, ties to the earlier; those that were given up come last."""
        limits = self.limits()
        return sorted(
            trials,
            key=lambda trial: (
                trial.status == "stopped",
                parego(list(trial.costs.values()), weights, limits, rho),
                trial.id,
            ),
        )[:count]

    def elite(self, cap: int = 16) -> list[Configuration]:
        """The best of each task and the Pareto set, at the highest budget that was reached."""
        sound = [trial for trial in self.trials.values() if trial.status == "ok"]
        if not sound:
            return []
        reached = max(trial.budget for trial in sound)
        trials = sorted((trial for trial in sound if trial.budget == reached), key=lambda trial: trial.id)
        costs = [list(trial.costs.values()) for trial in trials]
        limits = bounds(costs)
        places = dict.fromkeys(
            min(range(len(trials)), key=lambda place: (costs[place][task], place))
            for task in range(len(costs[0]))
        )
        front = sorted(pareto(costs), key=lambda place: (sum(scaled(costs[place], limits)), place))
        places.update(dict.fromkeys(front))
        return [trials[place].configuration for place in list(places)[:cap]]


class Sampler(Protocol):
    """Fills brackets."""

    def start(self, trials: Sequence[Trial]) -> None:
        """Told the starts and what came of them, before anything is proposed."""
        ...

    def propose(self, count: int, budget: int) -> list[Configuration]:
        """Up to `count` configurations to begin a bracket with at `budget`."""
        ...

    def learn(self, trials: Sequence[Trial]) -> None:
        """Told, after a bracket, each of its configurations at the highest budget it reached."""
        ...


class Racing:
    """Hyperband over the proposals of a sampler.

    Args:
        sampler: Fills the brackets.
        history: Shared with the sampler.
        starts: What is tried first.
        rungs: Budgets, ascending.
        eta: As in `TailorOptions`.
        num_tasks: T.
        rng: Draws the weights of the norm.
        rho: As in `TailorOptions`.
        generation: Configurations of a bracket where there is one rung.
    """

    def __init__(
        self,
        sampler: Sampler,
        history: History,
        starts: Sequence[Configuration],
        rungs: Sequence[int],
        *,
        num_tasks: int,
        rng: random.Random,
        eta: int = 3,
        rho: float = RHO,
        generation: int = 8,
    ) -> None:
        self._sampler, self._history, self._starts = sampler, history, list(starts)
        self._rungs, self._eta, self._rho, self._generation = tuple(rungs), eta, rho, generation
        self._num_tasks, self._rng = num_tasks, rng
        self._rounds = self._play()
        self._told: list[Trial] | None = None

    def ask(self) -> list[Request]:
        """One rung."""
        try:
            return next(self._rounds) if self._told is None else self._rounds.send(self._told)
        except StopIteration:
            return []

    def tell(self, trials: Sequence[Trial]) -> None:
        """The rung's answers."""
        self._told = list(trials)

    def _play(self) -> Generator[list[Request], list[Trial], None]:
        rungs, eta = self._rungs, self._eta
        last = len(rungs) - 1
        seeds: list[Trial] = []
        if self._starts:
            seeds = yield self._rung(self._starts, rungs[0], self._count(last))
            self._history.add(seeds)
            self._sampler.start(seeds)
        stale = 0
        while stale < _STALE_ROUNDS:
            stale += 1
            for bracket in range(last, -1, -1):
                count = self._count(bracket)
                if seeds:
                    group = [trial.configuration for trial in self._best(seeds, count)]
                    seeds = []
                else:
                    group = self._sampler.propose(count, rungs[last - bracket])
                highest: dict[str, Trial] = {}
                for budget in rungs[last - bracket :]:
                    if not group:
                        break
                    trials = yield self._rung(group, budget, max(1, len(group) // eta))
                    stale = 0 if self._history.add(trials) else stale
                    highest.update((trial.configuration.key, trial) for trial in trials)
                    group = [trial.configuration for trial in self._best(trials, max(1, len(trials) // eta))]
                self._sampler.learn(list(highest.values()))

    def _count(self, bracket: int) -> int:
        """Configurations that a bracket begins with."""
        last = len(self._rungs) - 1
        count = math.ceil((last + 1) / (bracket + 1) * self._eta**bracket)
        return max(count, self._generation) if last == 0 else count

    def _rung(self, group: Sequence[Configuration], budget: int, survivors: int) -> list[Request]:
        """What is asked at once. From the highest rung nothing goes on, but what one trial there beats on
        every task can't be chosen.
        """
        survivors = 1 if budget == self._rungs[-1] else survivors
        return [Request(configuration, budget, survivors) for configuration in group]

    def _best(self, trials: Sequence[Trial], count: int) -> list[Trial]:
        return self._history.best(trials, count, simplex(self._rng, self._num_tasks), self._rho)
