"""RegMean against least squares on the inputs themselves."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_state_dicts, merge_tensors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def grams(inputs):
    return [(x.T @ x / len(x)).astype(np.float32) for x in inputs]


MODELS = [normal(seed, 5, 8).astype(np.float32) for seed in (1, 2, 3)]
INPUTS = [normal(seed, 40, 8) @ normal(seed + 10, 8, 8) for seed in (1, 2, 3)]


def least_squares(models, inputs, weights=(1.0, 1.0, 1.0)):
    """The layer whose outputs on all inputs are nearest to those of each model on its own."""
    rows = [np.sqrt(w / len(x)) * x for w, x in zip(weights, inputs, strict=True)]
    outputs = [x @ model.T.astype(float) for x, model in zip(rows, models, strict=True)]
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(outputs), rcond=None)[0].T


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_it_is_least_squares_on_the_inputs(weights):
    merged = merge_tensors(
        None, MODELS, "regmean", statistics=grams(INPUTS), weight=weights, off_diagonal=1.0
    )
    np.testing.assert_allclose(merged, least_squares(MODELS, INPUTS, weights), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [0.9, 0.0])
def test_off_diagonal_entries_are_scaled_first(factor):
    scaled = [g * factor + (1 - factor) * np.diag(np.diag(g)) for g in map(np.float64, grams(INPUTS))]
    wanted = sum(m @ g for m, g in zip(MODELS, scaled, strict=True)) @ np.linalg.inv(sum(scaled))
    merged = merge_tensors(None, MODELS, "regmean", statistics=grams(INPUTS), off_diagonal=factor)
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)


def test_equal_inputs_give_the_weighted_mean():
    merged = merge_tensors(None, MODELS, "regmean", statistics=grams(INPUTS[:1]) * 3, weight=(1.0, 2.0, 5.0))
    wanted = merge_tensors(None, MODELS, "linear", weight=(1.0, 2.0, 5.0))
    np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)


def test_inputs_that_one_model_alone_has_are_that_models_and_inputs_of_none_keep_the_mean():
    first, second = np.zeros((8, 8)), np.zeros((8, 8))
    first[:3, :3], second[3:6, 3:6] = np.eye(3), 4 * np.eye(3)
    merged = merge_tensors(None, MODELS[:2], "regmean", statistics=[first, second])
    mean = (MODELS[0] + MODELS[1]) / 2
    wanted = np.hstack([MODELS[0][:, :3], MODELS[1][:, 3:6], mean[:, 6:]])
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def test_what_was_not_measured_is_averaged():
    models = [{"layers.0.up.weight": m, "norm.weight": m[0]} for m in MODELS]
    statistics = [{"layers.0.up.weight": gram} for gram in grams(INPUTS)]
    merged = merge_state_dicts(None, models, "regmean", statistics=statistics, weight=(1.0, 2.0, 5.0))
    wanted = (MODELS[0] + 2 * MODELS[1] + 5 * MODELS[2])[0] / 8
    np.testing.assert_allclose(merged["norm.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_layers_stored_inputs_first_are_turned():
    models = [{"h.0.mlp.c_fc.weight": np.ascontiguousarray(m.T)} for m in MODELS]
    statistics = [{"h.0.mlp.c_fc.weight": gram} for gram in grams(INPUTS)]
    merged = merge_state_dicts(
        None, models, "regmean", statistics=statistics, config={"model_type": "gpt2"}, off_diagonal=1.0
    )
    np.testing.assert_allclose(
        merged["h.0.mlp.c_fc.weight"].T, least_squares(MODELS, INPUTS), rtol=1e-3, atol=1e-4
    )


def test_a_wrong_option_or_shape_is_named():
    with pytest.raises(InputError, match=r"off_diagonal: must be in \[0, 1\], got 2"):
        merge_tensors(None, MODELS, "regmean", statistics=grams(INPUTS), off_diagonal=2.0)
    with pytest.raises(InputError, match=r"gram of tensor in model 0 is \[3, 3\], the parameter is \[5, 8\]"):
        merge_tensors(None, MODELS, "regmean", statistics=[np.eye(3)] * 3)
