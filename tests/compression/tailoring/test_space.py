"""Configurations: one form for each meaning, counted and drawn right."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.compression.tailoring.designs import drop_orders, patterns, starting_grid, starts
from weightsmith.compression.tailoring.encoding import decoded, encoded
from weightsmith.compression.tailoring.evolution import crossed, mutated
from weightsmith.compression.tailoring.space import Configuration, Layer, Space, num_dropped
from weightsmith.errors import InputError


def test_the_number_of_dropped_layers_is_the_share_rounded_up():
    for depth, thousandths in itertools.product(range(1, 65), range(0, 1000, 25)):
        exact = -(-depth * thousandths // 1000)  # in whole numbers, where nothing is rounded
        if exact == depth:
            with pytest.raises(InputError, match=rf"expected 0\.\.{depth - 1}"):
                num_dropped(depth, sparsity=thousandths / 1000)
            continue
        assert num_dropped(depth, sparsity=thousandths / 1000) == exact
        assert num_dropped(depth, keep_layers=depth - exact) == exact


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({}, "found neither"),
        ({"sparsity": 0.5, "keep_layers": 2}, "found both"),
        ({"keep_layers": 0}, r"keep_layers: 0, expected 1\.\.4"),
        ({"keep_layers": 5}, r"expected 1\.\.4"),
        ({"sparsity": 1.0}, r"expected 0\.\.3"),
        ({"sparsity": float("nan")}, "sparsity: nan"),
        ({"sparsity": -0.1}, "sparsity: -0.1"),
    ],
)
def test_a_wrong_number_of_layers_says_what_is_legal(given_, words):
    with pytest.raises(InputError, match=words):
        num_dropped(4, **given_)


spaces = st.builds(
    lambda depth, share, candidates, merge: Space(
        depth=depth, num_dropped=int(share * depth), num_candidates=candidates, merge=merge
    ),
    st.integers(1, 9),
    st.floats(0, 0.99),
    st.integers(0, 3),
    st.booleans(),
)


@given(spaces, st.integers(0, 1000))
def test_making_a_configuration_canonical_twice_changes_nothing(space, seed):
    found = space.random(random.Random(seed))
    layers = {layer.layer: layer for layer in found.layers}
    again = space.configuration(
        list(reversed(found.dropped)),
        {number: tuple(reversed(layer.sources)) for number, layer in layers.items()},
        {number: layer.weight for number, layer in layers.items()},
    )
    assert again == found
    assert again.key == found.key
    assert Configuration.from_json(found.to_json()) == found


def test_what_means_the_same_is_the_same():
    one = Configuration.of(3, [2, 1, 1], {0: [1]}, {0: 0.3})
    other = Configuration.of(3, [1, 2], {0: [1, 1]}, {0: 0.9})
    assert one == other
    assert one.layers == (Layer(0, (1,), 1.0),)
    assert Configuration.of(2, [], {0: [1, 2]}, {0: 0.0004}) == Configuration.of(2, [])


def test_different_configurations_have_different_keys():
    space = Space(depth=3, num_dropped=1, num_candidates=2, low=0.999, high=1.0)
    every = list(space.every())
    assert len({configuration.key for configuration in every}) == len(every) == space.size


def test_the_size_of_the_space_is_that_of_the_paper():
    # C(l, R) times, for each kept layer, 2^K subsets, of which those of two and more have a weight.
    assert Space(depth=5, num_dropped=1, num_candidates=1, low=1.0, high=1.0).size == 5 * 2**4
    one = 1 + 3 + 4 * 1000
    assert Space(depth=8, num_dropped=2, num_candidates=3).size == math.comb(8, 2) * one**6


@given(spaces, st.integers(0, 1000))
def test_every_move_stays_in_the_space(space, seed):
    rng = random.Random(seed)
    one, other = space.random(rng), space.random(rng)
    for found in (one, mutated(space, one, rng), crossed(space, one, other, rng)):
        space.check(found)
        assert all(0 <= layer.weight <= 1 for layer in found.layers)


@given(spaces, st.integers(0, 1000))
def test_flat_values_give_the_configuration_back(space, seed):
    found = space.random(random.Random(seed))
    assert decoded(space, encoded(space, found)) == found


def test_a_child_drops_what_both_parents_drop():
    space = Space(depth=8, num_dropped=3)
    one, other = space.configuration([1, 2, 3]), space.configuration([2, 3, 4])
    for seed in range(20):
        child = crossed(space, one, other, random.Random(seed))
        assert {2, 3} <= set(child.dropped) <= {1, 2, 3, 4}


def test_the_papers_starts_are_129_for_three_candidates():
    space = Space(depth=32, num_dropped=9, num_candidates=3)
    grid = starting_grid(space)
    assert len(grid) == 129
    assert len(starts(space)) == 3 * (1 + 3 + 4 * 6)  # a weight of one source means nothing
    assert sorted(patterns(3)) == sorted([(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)])
    assert len(patterns(5)) == 5 + 10 + 1
    assert patterns(0) == []


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 32])
def test_orders_of_dropping_name_every_layer_once_and_the_ends_last(depth):
    for order in drop_orders(depth).values():
        assert sorted(order) == list(range(depth))
        assert order[-1] == 0
        if depth > 2:
            assert order[-2] == depth - 1


def test_the_orders_begin_where_their_names_say():
    orders = drop_orders(32)
    assert set(orders["higher-first"][:15]) == set(range(16, 31))
    assert set(orders["middle-outward"][:7]) == set(range(13, 20))
    assert [layer >= 16 for layer in orders["alternating"][:6]] == [True, False] * 3


def test_few_starts_keep_those_by_influence_and_the_bases():
    space = Space(depth=8, num_dropped=2, num_candidates=3)
    influences = [
        [0.9, 0.1, 0.8, 0.7, 0.05, 0.6, 0.5, 0.9],
        *np.random.default_rng(0).random((3, 8)).tolist(),
    ]
    found = starts(space, influences, limit=10)
    assert len(found) == len(set(found)) == 10
    for number, (one, influence) in enumerate(zip(found[:4], influences, strict=True)):
        assert set(one.dropped) == set(np.argsort(influence)[:2].tolist())
        assert {layer.sources for layer in one.layers} == {(number,) if number else ()}
    assert sum(not any(layer.sources for layer in one.layers) for one in found) == 4
    assert starts(space, influences, limit=3) == found[:3]


def test_starts_without_blends_have_none():
    space = Space(depth=8, num_dropped=2, num_candidates=3, merge=False)
    assert all(one.num_merged == 0 for one in starts(space))
    assert len(starts(space)) == 3 * (1 + 3)


def test_a_configuration_of_wrong_layers_is_refused():
    with pytest.raises(InputError, match="no layer 5"):
        Configuration.of(3, [5])
    with pytest.raises(InputError, match="all 3 layers"):
        Configuration.of(3, [0, 1, 2])
    with pytest.raises(InputError, match="ascending"):
        Configuration.from_json(
            {"depth": 2, "layers": [{"layer": 1, "sources": []}, {"layer": 0, "sources": []}]}, "p"
        )
    with pytest.raises(InputError, match="p: not a configuration"):
        Configuration.from_json({"depth": 2}, "p")


def test_a_weight_lies_on_the_grid_and_in_the_range():
    space = Space(depth=4, num_dropped=1, num_candidates=2, low=0.3333, high=0.6667, merge=True)
    assert [space.weight(value) for value in (0.0, 0.3333, 0.5, 0.6667, 1.0)] == [
        0.334,
        0.334,
        0.5,
        0.666,
        0.666,
    ]
    assert (space.weights[0], space.weights[-1]) == (0.334, 0.666)
