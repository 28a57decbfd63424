"""From exponents to decays: the paper's rule, its limits, and options that make no sense."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.errors import InputError
from weightsmith.training.alphadecay.options import AlphaDecayOptions, decay_factors


def factors(scores, numel=None, layers=None, **options):
    scores = np.asarray(scores, np.float64)
    return decay_factors(
        scores, AlphaDecayOptions(**options), numel=numel or [1] * len(scores), layers=layers
    )


def test_the_smallest_exponent_gets_the_low_end_and_the_largest_the_high_end():
    np.testing.assert_allclose(factors([2.0, 4.0, 3.0], scale_range=(0.5, 2.5)), [0.5, 2.5, 1.5])


@given(st.lists(st.floats(1.01, 50, allow_nan=False), min_size=2, max_size=12))
def test_the_linear_rule_is_monotone_and_stays_in_its_range(scores):
    found = factors(scores, scale_range=(0.67, 3.0))
    assert np.all((found >= 0.67 - 1e-12) & (found <= 3.0 + 1e-12))
    order = np.argsort(scores)
    assert np.all(np.diff(found[order]) >= -1e-12)


@pytest.mark.parametrize("scores", [[2.5], [2.5, 2.5, 2.5], [3.0, 3.0 + 1e-9]])
def test_equal_exponents_give_the_base_decay(scores):
    assert np.all(factors(scores) == 1.0)


def test_a_matrix_without_an_exponent_gets_the_base_decay_and_sets_no_bound():
    found = factors([math.nan, 2.0, math.inf, 3.0], scale_range=(0.5, 2.0))
    np.testing.assert_array_equal(found, [1.0, 0.5, 1.0, 2.0])
    assert np.all(factors([math.nan, math.nan]) == 1.0)


def test_equal_ends_are_uniform_decay_exactly():
    assert np.all(factors([2.0, 3.7, 2.9], scale_range=(1.0, 1.0)) == 1.0)


def test_sqrt_and_log2_are_relative_to_their_mean():
    scores = [2.0, 3.0, 5.0]
    mean = sum(math.sqrt(score) for score in scores) / 3
    np.testing.assert_allclose(factors(scores, assign="sqrt"), [math.sqrt(score) / mean for score in scores])
    mean = sum(math.log2(score) for score in scores) / 3
    np.testing.assert_allclose(factors(scores, assign="log2"), [math.log2(score) / mean for score in scores])


def test_the_sigmoid_of_gradient_norms_compares_within_a_layer():
    norms, layers = [1.0, 3.0, 10.0, 30.0], [0, 0, 1, 1]
    # Two values are one standard deviation below and above their mean.
    low, high = 2 / (1 + math.exp(4.0)), 2 / (1 + math.exp(-4.0))
    found = factors(norms, layers=layers, assign="sigmoid_gradnorm")
    np.testing.assert_allclose(found, [low, high, low, high], atol=1e-6)


def test_normalising_makes_the_mean_over_weights_one():
    numel = [100, 10, 1000]
    found = factors([2.0, 3.0, 4.0], numel=numel, normalize="mean")
    assert np.dot(found, numel) / sum(numel) == pytest.approx(1.0)
    plain = factors([2.0, 3.0, 4.0], numel=numel)
    np.testing.assert_allclose(found / found[0], plain / plain[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_range": (3.0, 0.67)}, "scale_range"),
        ({"scale_range": (-0.1, 1.0)}, "scale_range"),
        ({"scale_range": (0.5, math.inf)}, "scale_range"),
        ({"scale_range": (math.nan, 1.0)}, "scale_range"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"base_weight_decay": -0.1}, "base_weight_decay"),
        ({"base_weight_decay": math.nan}, "base_weight_decay"),
        ({"min_dim": 1}, "min_dim"),
        ({"tail_fraction": 1.0}, "tail_fraction"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        AlphaDecayOptions(**options)
