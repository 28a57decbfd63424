"""RAM and RAM+ against counting, entry by entry."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_tensors

RNG = np.random.default_rng(4)
BASE = RNG.standard_normal((20, 15)).astype(np.float32)
# Each model changes three entries in ten, some of them by next to nothing.
MODELS = [
    BASE
    + (RNG.random(BASE.shape) < 0.3).astype(np.float32)
    * RNG.choice(np.float32([-1, -0.001, 0.5]), BASE.shape)
    for _ in range(3)
]


def reference(epsilon, r=0.0, alpha=0.0):
    changes = [np.where(abs(model - BASE) > epsilon, (model - BASE).astype(float), 0) for model in MODELS]
    count = sum(change != 0 for change in changes)
    merged = np.zeros(BASE.shape)
    for change in changes:
        own = change != 0
        shared, alone = np.count_nonzero(own & (count > 1)), np.count_nonzero(own & (count == 1))
        strength = 1 + r * min(shared / alone, alpha)
        merged += np.where(count == 1, strength * change, change / np.maximum(count, 1))
    return BASE + merged


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.01])
def test_ram_is_the_mean_over_those_who_changed_a_weight(epsilon):
    merged = merge_tensors(BASE, MODELS, "ram", epsilon=epsilon)
    np.testing.assert_allclose(merged, reference(epsilon), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 10.0), (0.0, 1.0)])
def test_ram_plus_strengthens_what_one_model_alone_changed(r, alpha):
    merged = merge_tensors(BASE, MODELS, "ramplus_tl", epsilon=0.01, r=r, alpha=alpha)
    np.testing.assert_allclose(merged, reference(0.01, r, alpha), rtol=1e-5, atol=1e-6)


def test_where_every_model_changed_every_weight_it_is_the_mean():
    models = [BASE + np.float32(change) for change in (0.1, 0.2, 0.6)]
    for method in ("ram", "ramplus_tl"):
        np.testing.assert_allclose(merge_tensors(BASE, models, method), BASE + 0.3, rtol=1e-5, atol=1e-6)


def test_a_negative_bound_is_named():
    with pytest.raises(InputError, match=r"epsilon: must be in \[0, inf\), got -1"):
        merge_tensors(BASE, MODELS, "ram", epsilon=-1.0)
