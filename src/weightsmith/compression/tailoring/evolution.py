"""Proposals by variation of the best: most of them mutated, a quarter crossed, a few drawn afresh.

    parent   by its rank among the best at the highest budget, by an aim that is drawn for each child
             (`objective.draw_aim`)
    mutate   swap a dropped layer with a kept one (p .4), flip one source of one layer (.4), move one lambda
             by N(0, 0.15) (.2); once (p .6), or 1 + Poisson(1) times
    cross    drop what both parents drop and a draw of what one does; each layer from either parent

Ours, as all that the paper leaves to SMAC's own sampling. A layer that comes in by a swap takes the sources
of the one that goes, so that the mixture of models stays what it was.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

from weightsmith.compression.tailoring.backends import History
from weightsmith.compression.tailoring.objective import RHO, Select, draw_aim
from weightsmith.compression.tailoring.space import Configuration, Space
from weightsmith.compression.tailoring.trials import Trial

_TRIES = 20
_SMALL_SPACE = 200_000
"""Configurations of a space that may be walked through to find one that is left."""
_STEP = 0.15
_MUTATED, _CROSSED = 0.65, 0.25
_ONCE = 0.6
_DEPTH = 1.5
"""Mean rank of a parent, from 0."""


class Evolution:
    """Fills brackets by mutation, crossover and chance.

    Args:
        space: The space.
        history: What was measured.
        rng: Of every draw.
        select: As in `draw_aim`.
        rho: As in `TailorOptions`.
        fresh_only: Only chance: the baseline.
    """

    def __init__(
        self,
        space: Space,
        history: History,
        rng: random.Random,
        *,
        select: Select = "mean",
        rho: float = RHO,
        fresh_only: bool = False,
    ) -> None:
        self._space, self._history, self._rng = space, history, rng
        self._select, self._rho, self._fresh_only = select, rho, fresh_only

    def learn(self, trials: Sequence[Trial]) -> None:
        """Nothing to do: trials are in the history."""

    def propose(self, count: int, budget: int) -> list[Configuration]:
        """Configurations that were not measured at this budget; fewer when no more are left."""
        found: dict[str, Configuration] = {}
        for _ in range(count):
            configuration = self._new(budget, found)
            if configuration is None:
                break
            found[configuration.key] = configuration
        return list(found.values())

    def _new(self, budget: int, taken: dict[str, Configuration]) -> Configuration | None:
        def is_new(configuration: Configuration) -> bool:
            return configuration.key not in taken and not self._history.has(configuration, budget)

        make = self._maker()
        for attempt in range(2 * _TRIES):
            configuration = make() if attempt < _TRIES else self._space.random(self._rng)
            if is_new(configuration):
                return configuration
        if self._space.size > _SMALL_SPACE:
            return None
        left = [configuration for configuration in self._space.every() if is_new(configuration)]
        return self._rng.choice(left) if left else None

    def _maker(self) -> Callable[[], Configuration]:
        rng, kind, parents = self._rng, self._rng.random(), []
        if not self._fresh_only:
            aim = draw_aim(rng, self._history.limits(), self._select, self._rho)
            parents = self._history.parents(aim)
        if not parents or kind >= _MUTATED + _CROSSED:
            return lambda: self._space.random(rng)

        def parent() -> Configuration:
            return parents[min(int(rng.expovariate(1 / _DEPTH)), len(parents) - 1)]

        if kind >= _MUTATED:
            return lambda: crossed(self._space, parent(), parent(), rng)
        return lambda: mutated(self._space, parent(), rng)


def mutated(space: Space, parent: Configuration, rng: random.Random) -> Configuration:
    """A configuration one move or a few away from its parent."""
    dropped = list(parent.dropped)
    sources = {layer.layer: layer.sources for layer in parent.layers}
    weights = {layer.layer: layer.weight for layer in parent.layers}
    for _ in range(1 if rng.random() < _ONCE else 1 + _poisson(rng)):
        merged = [layer for layer in sources if len(sources[layer]) > 1]
        moves = {"swap": 0.4 if dropped else 0.0, "flip": 0.4 if space.num_candidates else 0.0}
        moves["weigh"] = 0.2 if merged and space.low < space.high else 0.0
        if not any(moves.values()):
            break  # one configuration is all there is
        (move,) = rng.choices(list(moves), list(moves.values()))
        if move == "swap":
            comes, goes = rng.choice(dropped), rng.choice(sorted(sources))
            sources[comes], weights[comes] = sources.pop(goes), weights.pop(goes)
            dropped[dropped.index(comes)] = goes
        elif move == "flip":
            layer = rng.choice(sorted(sources))
            sources[layer] = _flipped(space, sources[layer], rng)
            if len(sources[layer]) == 2:  # a blend that is new has no lambda yet
                weights[layer] = rng.uniform(space.low, space.high)
        else:
            layer = rng.choice(sorted(merged))
            weights[layer] = space.weight(weights[layer] + rng.gauss(0.0, _STEP))
    return space.configuration(dropped, sources, weights)


def crossed(space: Space, one: Configuration, other: Configuration, rng: random.Random) -> Configuration:
    """A child of two configurations."""
    both = set(one.dropped) & set(other.dropped)
    either = sorted(set(one.dropped) ^ set(other.dropped))
    dropped = [*sorted(both), *rng.sample(either, space.num_dropped - len(both))]
    genes = [{layer.layer: layer for layer in parent.layers} for parent in (one, other)]
    sources, weights = {}, {}
    for number in range(space.depth):
        found = [parent[number] for parent in genes if number in parent]
        if number not in dropped:
            layer = rng.choice(found)
            sources[number], weights[number] = layer.sources, layer.weight
    return space.configuration(dropped, sources, weights)


def _flipped(space: Space, sources: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """One source more or less; another one where a layer may only have one."""
    number = rng.randint(1, space.num_candidates)
    if not space.merge:
        return () if sources == (number,) else (number,)
    return tuple(sorted(set(sources) ^ {number}))


def _poisson(rng: random.Random) -> int:
    """Poisson(1) by the product of uniform numbers."""
    product = rng.random()
    for count in itertools.count():
        if product < math.exp(-1):
            return count
        product *= rng.random()
    raise AssertionError  # the count has no end
