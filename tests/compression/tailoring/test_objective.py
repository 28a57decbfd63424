"""Several costs as one, and the choice among plans."""

import itertools
import random

import pytest

from weightsmith.compression.tailoring.objective import (
    bounds,
    choose,
    draw_aim,
    parego,
    pareto,
    scaled,
    simplex,
)
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.trials import Trial
from weightsmith.errors import InputError


def trial(number, *costs, merged=0):
    sources = {layer: (1, 2) for layer in range(merged)}
    configuration = Configuration.of(4, [3], sources, dict.fromkeys(sources, 0.5))
    return Trial(
        id=number,
        configuration=configuration,
        budget=1,
        costs={f"t{place}": cost for place, cost in enumerate(costs)},
    )


def test_the_norm_of_two_tasks_is_that_of_a_hand_calculation():
    limits = [(0.2, 0.6), (0.0, 0.5)]
    # g = (0.5, 0.2): w g = (0.15, 0.14), the larger one and a twentieth of their sum.
    assert parego([0.4, 0.1], [0.3, 0.7], limits) == pytest.approx(0.15 + 0.05 * 0.29)


def test_a_task_on_which_all_are_equal_does_not_count():
    assert scaled([0.3, 0.1], [(0.3, 0.3), (0.0, 0.2)]) == [0.0, 0.5]


def test_the_pareto_set_is_that_of_comparing_all_with_all():
    rng = random.Random(0)
    for size, tasks in itertools.product((1, 2, 7, 40), (1, 2, 3)):
        costs = [[rng.randrange(6) / 5 for _ in range(tasks)] for _ in range(size)]

        def beats(one, other):
            return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

        expected = [
            place for place, cost in enumerate(costs) if not any(beats(other, cost) for other in costs)
        ]
        assert pareto(costs) == expected


def test_weights_lie_on_the_simplex():
    drawn = simplex(random.Random(0), 3)
    assert sum(drawn) == pytest.approx(1)
    assert min(drawn) > 0


def test_the_chosen_plan_has_the_least_mean_and_then_the_fewest_blends():
    trials = [
        trial(0, 0.0, 1.0),
        trial(1, 0.4, 0.4, merged=2),
        trial(2, 0.4, 0.4, merged=1),
        trial(3, 1.0, 0.0),
    ]
    assert choose(trials).id == 2
    assert choose([trial(7, 0.5, 0.5), trial(3, 0.5, 0.5)]).id == 3


def test_scaled_costs_weigh_a_task_the_more_the_less_its_costs_differ():
    trials = [trial(0, 0.30, 0.1), trial(1, 0.28, 0.4), trial(2, 0.27, 0.9)]
    assert choose(trials).id == 0
    assert choose(trials, "scaled_mean").id == 1


def test_the_largest_cost_may_decide_instead():
    trials = [trial(0, 0.0, 0.7), trial(1, 0.4, 0.4), trial(2, 1.0, 0.0), trial(3, 0.0, 1.0)]
    assert choose(trials).id == 0
    assert choose(trials, "chebyshev").id == 1


def test_a_function_may_choose_among_the_pareto_set_only():
    trials = [trial(0, 0.0, 1.0), trial(1, 0.9, 0.9), trial(2, 0.5, 0.5), trial(3, 0.9, 0.1)]
    assert choose(trials, lambda front: [one.id for one in front].index(3)).id == 3
    seen = []
    choose(trials, lambda front: seen.extend(one.id for one in front) or 0)
    assert seen == [0, 2, 3]
    with pytest.raises(InputError, match="expected a place"):
        choose(trials, lambda front: 9)
    with pytest.raises(InputError, match="mean, scaled_mean, chebyshev"):
        choose(trials, "median")


@pytest.mark.parametrize(("select", "wanted"), [("mean", 0.5), ("scaled_mean", 0.75), ("chebyshev", 1.0)])
def test_most_aims_are_what_the_plan_is_chosen_by_and_the_others_parego(select, wanted):
    rng, limits, costs = random.Random(0), [(0.0, 0.4), (0.0, 1.2)], [0.4, 0.6]
    found = [draw_aim(rng, limits, select)(costs) for _ in range(2000)]
    assert sum(value == pytest.approx(wanted) for value in found) == pytest.approx(1200, abs=80)
    assert len({round(value, 9) for value in found}) > 700
    only_front = [draw_aim(rng, limits, lambda front: 0)(costs) for _ in range(200)]
    assert len(set(only_front)) == 200


def test_one_task_has_one_order():
    rng = random.Random(0)
    for _ in range(20):
        aim = draw_aim(rng, [(0.2, 0.7)], "mean")
        assert aim([0.3]) < aim([0.4]) < aim([0.9])


def test_bounds_are_those_of_each_task():
    assert bounds([[0.1, 0.9], [0.5, 0.2]]) == [(0.1, 0.5), (0.2, 0.9)]
