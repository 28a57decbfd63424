"""Sums of stored bfloat16 are those of the three steps they replace, to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.tensors.bfloat16_sums import all_finite, weighted_sum_bfloat16
from weightsmith.tensors.blend import weighted_sum
from weightsmith.tensors.floats import from_float32, to_float32

INFINITY, NAN = 0x7F80, 0x7FC1


def fresh(name, numel):
    return np.empty(numel, np.float32)


def in_three_steps(rows, weights, divisor):
    values = np.empty(rows.shape, np.float32)
    to_float32(rows, "BF16", values)
    with np.errstate(over="ignore", invalid="ignore"):
        return from_float32(weighted_sum(values, weights, divisor), "BF16")


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    models=st.integers(1, 5),
    half=st.integers(1, 300),
    weights=st.sampled_from(["equal", "unequal", "ones", "zero"]),
)
def test_the_bits_are_those_of_widening_summing_and_rounding(seed, models, half, weights):
    rng = np.random.default_rng(seed)
    # Every finite number, subnormals and zeros of both signs among them.
    rows = rng.integers(0, INFINITY, (models, 2 * half), dtype=np.uint16)
    rows |= rng.integers(0, 2, rows.shape, dtype=np.uint16) << 15
    chosen = {
        "ones": [1.0] * models,
        "equal": [0.3] * models,
        "zero": [0.0, *([1.0] * (models - 1))],
        "unequal": rng.normal(size=models).tolist(),
    }[weights]
    divisor = float(rng.choice([1.0, models, 0.7]))
    wanted = in_three_steps(rows, chosen, divisor)
    out = np.empty(2 * half, np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = weighted_sum_bfloat16(rows, chosen, divisor, out, fresh)
    assert finite == all_finite(wanted)
    numbers = ~np.isnan(to_float32(wanted, "BF16"))
    np.testing.assert_array_equal(out[numbers], wanted[numbers])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("bits", [INFINITY, INFINITY | 0x8000, NAN, NAN | 0x8000, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("place", [0, 1, 6, 7])
@pytest.mark.parametrize("model", [0, 1])
def test_nothing_that_is_not_finite_goes_unseen(weights, bits, place, model):
    rows = np.full((2, 8), 0x3F80, np.uint16)
    rows[model, place] = bits
    assert all_finite(np.delete(rows[model], place))
    assert not all_finite(rows)
    with np.errstate(invalid="ignore"):
        assert not weighted_sum_bfloat16(rows, weights, 1.0, np.empty(8, np.uint16), fresh)


def test_nothing_is_finite():
    assert all_finite(np.empty((3, 0), np.uint16))
