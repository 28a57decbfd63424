"""Proposals by Optuna's tree-structured Parzen estimator, over all tasks at once.

Each configuration is told with the costs of the highest budget it reached in its bracket. Many values mean
the same configuration, so the estimator comes back to what is known: it is told so at once and asked again,
and after a few times chance proposes in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightsmith.compression.tailoring.backends import History, Sampler
from weightsmith.compression.tailoring.encoding import decoded, encoded, has_weights
from weightsmith.compression.tailoring.space import Configuration, Space
from weightsmith.compression.tailoring.trials import Trial
from weightsmith.errors import require

_TRIES = 4


class TPE:
    """Fills brackets by Optuna.

    Args:
        space: The space.
        history: What was measured.
        chance: Proposes where the estimator has nothing new.
        num_tasks: T.
        seed: Of the sampler.

    Raises:
        MissingExtraError: optuna is not installed.
    """

    def __init__(self, space: Space, history: History, chance: Sampler, num_tasks: int, seed: int) -> None:
        self._optuna: Any = require("optuna", extra="search", needed_by="optimizer optuna")
        self._space, self._history, self._chance = space, history, chance
        floats, choices = self._optuna.distributions.FloatDistribution, self._optuna.distributions
        self._distributions: dict[str, Any] = {}
        for layer in range(space.depth):
            self._distributions[f"drop_{layer}"] = floats(0.0, 1.0)
            if len(space.subsets) > 1:
                numbers = range(len(space.subsets))
                self._distributions[f"source_{layer}"] = choices.CategoricalDistribution(tuple(numbers))
            if has_weights(space):
                self._distributions[f"weight_{layer}"] = floats(space.low, space.high)
        level = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        try:
            self._study = self._optuna.create_study(
                directions=["minimize"] * num_tasks,
                sampler=self._optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True),
            )
        finally:
            self._optuna.logging.set_verbosity(level)
        self._open: dict[str, Any] = {}

    def propose(self, count: int, budget: int) -> list[Configuration]:
        """What the estimator suggests, and what chance does where that is known."""
        found: dict[str, Configuration] = {}
        for _ in range(count * _TRIES):
            if len(found) == count:
                break
            asked = self._study.ask(self._distributions)
            configuration = decoded(self._space, asked.params)
            known = self._history.trials.get((configuration.key, budget))
            if known is not None:
                self._study.tell(asked, list(known.costs.values()))
            elif configuration.key in found:
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._open[configuration.key] = asked
                found[configuration.key] = configuration
        for configuration in self._chance.propose(count - len(found), budget):
            found.setdefault(configuration.key, configuration)
        return list(found.values())

    def learn(self, trials: Sequence[Trial]) -> None:
        """Tells the costs of what was proposed."""
        for trial in trials:
            asked = self._open.pop(trial.configuration.key, None)
            if asked is None:
                self._add(trial)
            else:
                self._study.tell(asked, list(trial.costs.values()))

    def _add(self, trial: Trial) -> None:
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=encoded(self._space, trial.configuration),
                distributions=self._distributions,
                values=list(trial.costs.values()),
            )
        )
