"""NearSwap: its weighted form, which is a cut change."""

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging import merge_tensors


@pytest.mark.parametrize("t", [0.0, 0.01, 0.3, 100.0])
def test_it_is_the_weighted_form(t):
    rng = np.random.default_rng(0)
    base, model = rng.standard_normal((2, 500)).astype(np.float32)
    model[:50] = base[:50]
    distance = np.maximum(abs(model.astype(float) - base), 1e-12)
    weight = np.minimum(1, t / distance)
    merged = merge_tensors(base, [model], "nearswap", t=t)
    np.testing.assert_allclose(merged, weight * model + (1 - weight) * base, rtol=1e-5, atol=1e-6)


def test_it_takes_one_model_and_no_negative_bound():
    base = np.zeros(3)
    with pytest.raises(InputError, match="`nearswap` merges 1 models, got 2"):
        merge_tensors(base, [base, base], "nearswap")
    with pytest.raises(InputError, match=r"t: must be in \[0, inf\), got -1"):
        merge_tensors(base, [base], "nearswap", t=-1.0)
