"""Consensus: masks counted entry by entry."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_tensors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


BASE = normal(0, 20, 15)
MODELS = [BASE + normal(seed, 20, 15) for seed in (1, 2, 3)]


def reference(weights, talls, agree, scale):
    changes = [(model - BASE).astype(float) for model in MODELS]
    total = sum(w * c for w, c in zip(weights, changes, strict=True))
    count = sum(abs(c) > tall * abs(total - c) for c, tall in zip(changes, talls, strict=True))
    return BASE + scale * np.where(count >= agree, total, 0)


@pytest.mark.parametrize("agree", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("talls", [(0.4, 0.4, 0.4), (0.2, 1.0, 2.0), (0.0, 0.0, 0.0)])
def test_it_is_the_reference_entry_by_entry(agree, talls):
    weights = (1.0, 0.5, 0.7)
    merged = merge_tensors(BASE, MODELS, "consensus", weight=weights, tall=talls, agree=agree, lambda_=0.6)
    np.testing.assert_allclose(merged, reference(weights, talls, agree, 0.6), rtol=1e-5, atol=1e-5)


def test_without_agreement_it_is_task_arithmetic_and_with_too_much_the_base():
    wanted = merge_tensors(BASE, MODELS, "task_arithmetic", lambda_=0.3)
    np.testing.assert_allclose(
        merge_tensors(BASE, MODELS, "consensus", lambda_=0.3, agree=0), wanted, atol=1e-6
    )
    np.testing.assert_array_equal(merge_tensors(BASE, MODELS, "consensus", agree=4), BASE)


def test_a_weight_that_one_task_alone_changed_is_left_as_it_was():
    base, models = np.zeros(3), [np.array([1.0, 1.0, 0.0]), np.array([0.0, 2.0, 0.0])]
    np.testing.assert_allclose(merge_tensors(base, models, "consensus"), [0.0, 3.0, 0.0])


def test_a_wrong_option_is_named():
    with pytest.raises(InputError, match="agree: must be a whole number from 0 on, got -1"):
        merge_tensors(BASE, MODELS, "consensus", agree=-1)
    with pytest.raises(InputError, match=r"tall: must be in \[0, inf\), got -1"):
        merge_tensors(BASE, MODELS, "consensus", tall=-1.0)
