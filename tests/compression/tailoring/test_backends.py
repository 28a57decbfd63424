"""Racing: who goes on, from rung to rung."""

import random

import pytest

from weightsmith.compression.tailoring.backends import PARENTS, History, Racing
from weightsmith.compression.tailoring.evolution import Evolution
from weightsmith.compression.tailoring.space import Space
from weightsmith.compression.tailoring.trials import Trial

SPACE = Space(depth=8, num_dropped=2, num_candidates=3)
RUNGS = (10, 30, 90)


def costs_of(configuration):
    """Two tasks: one likes early layers, the other late ones."""
    kept = configuration.kept
    return {"early": 1 - sum((7 - layer) ** 2 for layer in kept) / 140, "late": 1 - sum(kept) / 28}


def racing(seed=0, starts=27, fresh_only=False, **options):
    rng, history, draws = random.Random(seed), History(), random.Random(1)
    first = list(dict.fromkeys(SPACE.random(draws) for _ in range(2 * starts)))[:starts]
    sampler = Evolution(SPACE, history, rng, fresh_only=fresh_only)
    return Racing(sampler, history, first, RUNGS, rng=random.Random(seed), **options), history


def play(backend, rounds, costs=costs_of):
    """What is asked, rung by rung."""
    asked, number = [], 0
    for _ in range(rounds):
        requests = backend.ask()
        trials = []
        for request in requests:
            given = costs(request.configuration)
            trials.append(
                Trial(id=number, configuration=request.configuration, budget=request.budget, costs=given)
            )
            number += 1
        backend.tell(trials)
        asked.append(requests)
    return asked


def test_the_starts_are_a_bracket_of_their_own():
    backend, _ = racing()
    asked = play(backend, 9)
    assert [(len(rung), rung[0].budget) for rung in asked] == [
        *((27, 10), (9, 30), (3, 90)),  # the starts
        *((9, 10), (3, 30), (1, 90)),
        *((5, 30), (1, 90)),
        (3, 90),
    ]
    for higher, lower in ((1, 0), (2, 1), (4, 3), (5, 4), (7, 6)):
        chosen = [request.configuration.key for request in asked[higher]]
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= {request.configuration.key for request in asked[lower]}
    assert [rung[0].survivors for rung in asked[:3]] == [9, 3, PARENTS]


def test_a_start_with_the_best_mean_is_not_lost_to_the_weights_of_one_draw():
    """Each start but one is the best of one task for some weights; that one has the best mean."""

    def costs(configuration):
        place = places.get(configuration, 0)
        early, late = (0.3, 0.3) if configuration == best else (place / 27, 1 - place / 27)
        return {"early": early, "late": late}

    reached = 0
    for seed in range(40):
        backend, _ = racing(seed)
        places = {one: place for place, one in enumerate(backend._starts)}
        best = backend._starts[20]
        asked = play(backend, 3, costs)
        assert best in [request.configuration for request in asked[1]]
        reached += best in [request.configuration for request in asked[2]]
    assert reached >= 34


def test_survivors_are_not_those_of_one_aim():
    found = set()
    for seed in range(20):
        backend, _ = racing(seed)
        starts, survivors = ([request.configuration for request in rung] for rung in play(backend, 2))
        ranked = sorted(starts, key=lambda one: sum(costs_of(one).values()))
        assert ranked[0] in survivors
        found.add(frozenset(survivors))
    assert len(found) > 5


def test_the_same_seed_asks_the_same_and_another_something_else():
    def keys(seed):
        backend, _ = racing(seed)
        return [[(one.configuration.key, one.budget) for one in rung] for rung in play(backend, 12)]

    assert keys(3) == keys(3)
    assert keys(3) != keys(4)


def test_parents_are_the_best_of_the_highest_budget():
    backend, history = racing()
    play(backend, 40)
    highest = [trial for trial in history.trials.values() if trial.budget == 90]
    assert len(highest) > PARENTS
    found = history.parents(lambda costs: costs[0])
    assert found == [
        trial.configuration
        for trial in sorted(highest, key=lambda trial: (trial.costs["early"], trial.id))[:PARENTS]
    ]


def test_children_come_nearer_to_what_is_looked_for_than_chance():
    def least(fresh_only):
        found = []
        for seed in range(6):
            backend, history = racing(seed, starts=3, fresh_only=fresh_only)
            play(
                backend, 60, lambda one: {"distance": sum(layer.sources != (2,) for layer in one.layers) / 6}
            )
            found.append(min(trial.costs["distance"] for trial in history.trials.values()))
        return sum(found)

    assert least(fresh_only=False) < least(fresh_only=True)


def test_a_space_that_is_spent_ends_the_race():
    space, history = Space(depth=3, num_dropped=1), History()
    backend = Racing(Evolution(space, history, random.Random(0)), history, [], (4,), rng=random.Random(0))
    asked = play(backend, 80, lambda one: {"kept": sum(one.kept) / 3})
    assert {request.configuration.dropped for rung in asked for request in rung} == {(0,), (1,), (2,)}
    assert asked[-1] == []


@pytest.mark.parametrize("select", ["mean", "chebyshev", len])
def test_every_choice_of_a_plan_has_aims(select):
    backend, _ = racing(select=select)
    assert all(play(backend, 9))
