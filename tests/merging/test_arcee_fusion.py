"""Arcee Fusion: scores, quartiles and the threshold between them, against float64."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_tensors
from weightsmith.merging.methods.arcee_fusion import row_divergences


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def divergences(model, base):
    def softmax(x):
        grown = np.exp(x.astype(float) - x.max(axis=-1, keepdims=True))
        return grown / grown.sum(axis=-1, keepdims=True)

    p, q = softmax(model), softmax(base)
    return (p * np.log(p / q)).sum(axis=-1, keepdims=True)


def reference(base, model):
    scores = abs(model.astype(float) - base) * divergences(model, base)
    order = np.sort(scores.reshape(-1))
    first, median, third = (order[int(share * (order.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(scores >= median + 1.5 * (third - first), model, base)


@pytest.mark.parametrize("shape", [(40, 30), (300, 40), (3, 20, 30), (900,), (7, 1), (3,)])
@pytest.mark.parametrize("change", [1.0, 1e-3])
def test_weights_are_taken_where_the_score_reaches_the_threshold(shape, change):
    base = normal(0, *shape)
    model = base + np.float32(change) * normal(1, *shape)
    merged, wanted = merge_tensors(base, [model], "arcee_fusion"), reference(base, model)
    differ = abs(merged - wanted) > 1e-6
    # A score may be the threshold but for rounding.
    assert differ.sum() <= 1
    if base.size > 100:
        assert 0.02 < (merged != base).mean() < 0.3


@pytest.mark.parametrize("change", [1.0, 1e-2, 1e-4])
def test_small_divergences_are_not_lost_to_rounding(change):
    base = normal(0, 20, 500)
    model = base + np.float32(change) * normal(1, 20, 500)
    found = row_divergences(model.copy(), base.copy())
    np.testing.assert_allclose(found, divergences(model, base)[:, 0], rtol=3e-4)


def test_a_model_equal_to_the_base_is_the_base():
    base = normal(0, 10, 10)
    np.testing.assert_array_equal(merge_tensors(base, [base.copy()], "arcee_fusion"), base)


def test_it_takes_exactly_one_model_and_no_options():
    base = np.zeros(3)
    with pytest.raises(InputError, match="`arcee_fusion` merges 1 models, got 2"):
        merge_tensors(base, [base, base], "arcee_fusion")
    with pytest.raises(InputError, match="t: no such option; known: none"):
        merge_tensors(base, [base], "arcee_fusion", t=1.0)
