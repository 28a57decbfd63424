"""SCE against its three steps, entry by entry."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_tensors


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(base, models, topk):
    changes = [(model - base).reshape(-1).astype(float) for model in models]
    variance = np.var(changes, axis=0)
    order = sorted(range(base.size), key=lambda i: (-variance[i], i))
    kept = set(order[: int(topk * np.count_nonzero(variance))]) if topk < 1 else set(range(base.size))
    changes = [[c[i] if i in kept else 0.0 for i in range(base.size)] for c in changes]
    energy = [sum(x * x for x in c) for c in changes]
    weights = [e / sum(energy) for e in energy]
    merged = []
    for entry in zip(*changes, strict=True):
        sign = 1 if sum(entry) >= 0 else -1
        agree = [(w, w * x) for w, x in zip(weights, entry, strict=True) if x * sign > 0]
        merged.append(sum(v for _, v in agree) / sum(w for w, _ in agree) if agree else 0.0)
    return base + np.array(merged).reshape(base.shape)


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1, 0.003])
@pytest.mark.parametrize("coarse", [False, True])
def test_it_is_the_reference_entry_by_entry(topk, coarse):
    base = normal(0, 20, 30)
    models = [base + scale * normal(seed, 20, 30) for seed, scale in ((1, 1), (2, 0.3), (3, 2))]
    if coarse:  # whole numbers: equal variances, votes that cancel, entries nobody changed
        base = np.round(base)
        models = [base + np.round(normal(seed, 20, 30)) for seed in (1, 2)]
    merged = merge_tensors(base, models, "sce", select_topk=topk)
    np.testing.assert_allclose(merged, reference(base, models, topk), rtol=1e-5, atol=1e-5)


def test_models_vote_with_their_changes_and_not_with_their_weights():
    base = np.zeros(3, np.float32)
    # The third model has nearly all energy; where it is -1 the sum is positive all the same.
    models = [np.float32([2, 0, 0]), np.float32([1, 0, 0]), np.float32([-1, 50, 50])]
    merged = merge_tensors(base, models, "sce")
    np.testing.assert_allclose(merged, [(2 * 4 + 1 * 1) / (4 + 1), 50, 50], rtol=1e-6)


def test_small_changes_weigh_by_energy_unless_a_floor_makes_them_equal():
    base = np.zeros(2, np.float32)
    models = [np.float32([1e-4, 1e-4]), np.float32([3e-4, 3e-4])]
    np.testing.assert_allclose(merge_tensors(base, models, "sce"), [2.8e-4] * 2, rtol=1e-5)
    merged = merge_tensors(base, models, "sce", weight_floor=1e-6)
    np.testing.assert_allclose(merged, [2e-4] * 2, rtol=1e-5)


def test_changes_that_all_models_share_are_no_selection():
    base = normal(0, 100)
    merged = merge_tensors(base, [base + np.float32(0.1)] * 3, "sce", select_topk=0.5)
    np.testing.assert_array_equal(merged, base)


def test_a_share_outside_0_and_1_is_named():
    with pytest.raises(InputError, match=r"select_topk: must be in \[0, 1\], got 2"):
        merge_tensors(np.zeros(3), [np.ones(3)], "sce", select_topk=2.0)
