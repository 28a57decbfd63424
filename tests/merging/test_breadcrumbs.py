"""Breadcrumbs: both ends of the magnitudes go, exactly as many as promised are left."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_tensors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def left(change, density, gamma):
    """The change without both ends, by a stable sort; among equals the lower index is the larger."""
    flat = change.reshape(-1).astype(float)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    count = int(density * flat.size)
    outliers = min(int(gamma * flat.size), flat.size - count)
    kept = np.zeros(flat.size)
    for i in order[outliers : outliers + count]:
        kept[i] = flat[i]
    return kept.reshape(change.shape)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.15, 0.01), (0.5, 0.1), (0.9, 0.2), (0.02, 0.0), (1.0, 0.3)]
)
def test_it_is_the_reference_entry_by_entry(density, gamma, coarse):
    base, models = normal(0, 20, 30), [normal(seed, 20, 30) for seed in (1, 2, 3)]
    if coarse:  # few values: equal magnitudes and exact zeros everywhere
        base, models = np.round(base), [np.round(model) for model in models]
    changes = [left(model - base, density, gamma) for model in models]
    options = {"density": density, "gamma": gamma, "weight": (0.5, 1.0, -0.3)}
    merged = merge_tensors(base, models, "breadcrumbs", lambda_=0.7, **options)
    added = sum(weight * change for weight, change in zip((0.5, 1.0, -0.3), changes, strict=True))
    np.testing.assert_allclose(merged, base + 0.7 * added, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_with_ties_those_who_agree_with_the_elected_sign_are_merged(normalize):
    base, models = np.zeros((20, 30), np.float32), [normal(seed, 20, 30) for seed in (1, 2, 3)]
    weights = (0.5, 1.0, 0.3)
    votes = [weight * left(model, 0.6, 0.1) for weight, model in zip(weights, models, strict=True)]
    sign = np.where(sum(votes) < 0, -1, 1)
    agree = [vote * sign > 0 for vote in votes]
    total = sum(np.where(flag, vote, 0) for flag, vote in zip(agree, votes, strict=True))
    divisor = sum(weight * flag for weight, flag in zip(weights, agree, strict=True)) if normalize else 1.0
    wanted = np.divide(
        total, divisor, out=np.zeros_like(total), where=np.broadcast_to(divisor, total.shape) > 0
    )
    merged = merge_tensors(
        base, models, "breadcrumbs_ties", density=0.6, gamma=0.1, weight=weights, normalize=normalize
    )
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)


def test_a_small_tensor_without_room_for_outliers_keeps_its_share():
    merged = merge_tensors(np.zeros(64, np.float32), [normal(1, 64)], "breadcrumbs", density=0.9, gamma=0.01)
    assert np.count_nonzero(merged) == int(0.9 * 64)


def test_exactly_the_promised_number_is_left_where_all_magnitudes_are_equal():
    model = np.where(np.arange(1000) % 3, 0.5, -0.5).astype(np.float32)
    merged = merge_tensors(np.zeros(1000, np.float32), [model], "breadcrumbs", density=0.3, gamma=0.05)
    np.testing.assert_array_equal(np.flatnonzero(merged), np.arange(50, 350))


def test_without_outliers_it_is_ties_trim_of_each_tensor():
    base, model = normal(0, 40, 30), normal(1, 40, 30)
    merged = merge_tensors(base, [model], "breadcrumbs_ties", density=0.3, gamma=0.0)
    wanted = merge_tensors(base, [model], "ties", density=0.3, trim_scope="tensor")
    np.testing.assert_array_equal(merged, wanted)


def test_the_l1_norm_of_a_change_can_be_restored():
    base, model = normal(0, 40, 30), normal(1, 40, 30)
    merged = merge_tensors(base, [model], "breadcrumbs", density=0.2, gamma=0.1, rescale="l1")
    np.testing.assert_allclose(np.abs(merged - base).sum(), np.abs(model - base).sum(), rtol=1e-3)


def test_a_share_of_outliers_beyond_its_range_is_named():
    with pytest.raises(InputError, match=r"gamma: must be in \[0, 1\), got 1"):
        merge_tensors(np.zeros(4), [np.ones(4)], "breadcrumbs", gamma=1.0)
