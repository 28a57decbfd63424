"""Who decides what is tried next: one protocol, ask and tell, over configurations and budgets.

Racing    Hyperband: brackets s = s_max .. 0 of n0 = ceil((s_max + 1) / (s + 1) eta^s) configurations; each
          rung keeps 1/eta, each the best by an aim of its own (`objective.draw_aim`), and gives them eta
          times the examples. Who fills a bracket is a sampler: `evolution`, `random`, or Optuna's TPE. The
          starts are a bracket of their own, the first.
SMAC      has brackets and scalarisation of its own: the paper's setting, `smac.py`.

What is asked depends on the seed and on what was told, never on how many workers there are or who is first.

Source  arXiv:2506.20480 (SMAC3 with Hyperband and ParEGO); Hyperband: arXiv:1603.06560. Ours: the aim and the
        bracket of starts, so that good ones are measured at every budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightsmith.compression.tailoring.objective import RHO, Aim, Select, bounds, draw_aim
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.trials import Trial

PARENTS = 4
"""So many of the best at the highest rung have children."""
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

    def best(self, trials: Sequence[Trial], count: int, aim: Aim) -> list[Trial]:
        """The `count` that the aim likes best, ties to the earlier; those that were given up come last."""
        return sorted(
            trials, key=lambda trial: (trial.status == "stopped", aim(list(trial.costs.values())), trial.id)
        )[:count]

    def parents(self, aim: Aim) -> list[Configuration]:
        """The few that an aim likes best at the highest budget that was reached."""
        sound = [trial for trial in self.trials.values() if trial.status == "ok"]
        reached = max((trial.budget for trial in sound), default=0)
        highest = [trial for trial in sound if trial.budget == reached]
        return [trial.configuration for trial in self.best(highest, PARENTS, aim)]


class Sampler(Protocol):
    """Fills brackets."""

    def propose(self, count: int, budget: int) -> list[Configuration]:
        """Up to `count` configurations to begin a bracket with at `budget`."""
        ...

    def learn(self, trials: Sequence[Trial]) -> None:
        """Told, after a bracket, each of its configurations at the highest budget it reached; at first the
        starts.
        """
        ...


class Racing:
    """Hyperband over the proposals of a sampler.

    Args:
        sampler: Fills the brackets.
        history: Shared with the sampler.
        starts: What is tried first.
        rungs: Budgets, ascending.
        eta: As in `TailorOptions`.
        rng: Draws the aims.
        select: As in `draw_aim`.
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
        rng: random.Random,
        select: Select = "mean",
        eta: int = 3,
        rho: float = RHO,
        generation: int = 8,
    ) -> None:
        self._sampler, self._history, self._starts = sampler, history, list(starts)
        self._rungs, self._eta, self._rho, self._generation = tuple(rungs), eta, rho, generation
        self._select, self._rng = select, rng
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
        yield from self._race(self._starts, self._rungs)
        last = len(self._rungs) - 1
        stale = 0
        while stale < _STALE_ROUNDS:
            stale += 1
            for bracket in range(last, -1, -1):
                rungs = self._rungs[last - bracket :]
                group = self._sampler.propose(self._count(bracket), rungs[0])
                found_new = yield from self._race(group, rungs)
                stale = 0 if found_new else stale

    def _race(
        self, group: list[Configuration], rungs: Sequence[int]
    ) -> Generator[list[Request], list[Trial], bool]:
        """A bracket; whether it brought anything new."""
        highest: dict[str, Trial] = {}
        found_new = False
        for budget in rungs if group else ():
            survivors = max(1, len(group) // self._eta)
            trials = yield self._rung(group, budget, survivors)
            found_new |= self._history.add(trials)
            highest.update((trial.configuration.key, trial) for trial in trials)
            group = [trial.configuration for trial in self._best(trials, survivors)]
        self._sampler.learn(list(highest.values()))
        return found_new

    def _best(self, trials: Sequence[Trial], count: int) -> list[Trial]:
        """One after the other, each by an aim of its own: no single draw decides over a rung."""
        left, taken, limits = list(trials), [], self._history.limits()
        for _ in range(min(count, len(left))):
            (best,) = self._history.best(left, 1, draw_aim(self._rng, limits, self._select, self._rho))
            left.remove(best)
            taken.append(best)
        return taken

    def _count(self, bracket: int) -> int:
        """Configurations that a bracket begins with."""
        last = len(self._rungs) - 1
        count = math.ceil((last + 1) / (bracket + 1) * self._eta**bracket)
        return max(count, self._generation) if last == 0 else count

    def _rung(self, group: Sequence[Configuration], budget: int, survivors: int) -> list[Request]:
        """What is asked at once. From the highest rung nothing goes on, but what enough trials there beat on
        every task can be neither chosen nor a parent.
        """
        survivors = PARENTS if budget == self._rungs[-1] else survivors
        return [Request(configuration, budget, survivors) for configuration in group]
