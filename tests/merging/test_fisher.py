"""Fisher merging: a mean whose weights are per entry."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_state_dicts, merge_tensors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MODELS = [normal(seed, 6, 50) for seed in (1, 2, 3)]
INFORMATION = [np.square(normal(seed, 6, 50)) for seed in (4, 5, 6)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 3.0, 0.0)])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_it_is_the_mean_by_information(weights, floor):
    shares = [w * np.maximum(f, floor) for w, f in zip(weights, INFORMATION, strict=True)]
    wanted = sum(s * m for s, m in zip(shares, MODELS, strict=True)) / sum(shares)
    merged = merge_tensors(None, MODELS, "fisher", statistics=INFORMATION, weight=weights, floor=floor)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-7)


def test_equal_information_is_the_weighted_mean_however_small_it_is():
    for size in (1.0, 1e-30, 0.0):
        merged = merge_tensors(
            None, MODELS, "fisher", statistics=[np.full((6, 50), size)] * 3, weight=(1.0, 2.0, 5.0)
        )
        wanted = merge_tensors(None, MODELS, "linear", weight=(1.0, 2.0, 5.0))
        np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def test_a_weight_that_one_model_alone_relies_on_is_that_models():
    information = [np.float32([1, 0]), np.float32([0, 2])]
    merged = merge_tensors(
        None, [np.array([3.0, 5.0]), np.array([7.0, 9.0])], "fisher", statistics=information
    )
    np.testing.assert_array_equal(merged, [3.0, 9.0])


def test_copies_of_one_model_are_that_model_bit_for_bit():
    merged = merge_tensors(None, [MODELS[0]] * 3, "fisher", statistics=INFORMATION)
    np.testing.assert_array_equal(merged, MODELS[0])


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (None, r"`fisher` needs statistics \(fisher\) of each model"),
        ([{"w": INFORMATION[0]}], "statistics: 1 are given for 2 models"),
        ([{"w": INFORMATION[0]}, {}], "statistics: those of model 1 have no `w`"),
        (
            [{"w": INFORMATION[0]}, {"w": np.ones(3)}],
            r"fisher of w in model 1 is \[3\], the parameter is \[6, 50\]",
        ),
    ],
)
def test_missing_or_mismatched_statistics_are_named(statistics, message):
    models = [{"w": MODELS[0]}, {"w": MODELS[1]}]
    with pytest.raises(InputError, match=message):
        merge_state_dicts(None, models, "fisher", statistics=statistics)


def test_statistics_for_a_method_that_takes_none_are_refused():
    with pytest.raises(InputError, match="`linear` takes no statistics"):
        merge_tensors(None, MODELS, "linear", statistics=INFORMATION)


@pytest.mark.parametrize("weight", [(0.0, 0.0, 0.0), (1.0, -1.0, 1.0)])
def test_weights_that_are_no_mean_are_refused(weight):
    with pytest.raises(InputError, match="weight: "):
        merge_tensors(None, MODELS, "fisher", statistics=INFORMATION, weight=weight)
