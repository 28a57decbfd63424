"""Casts against torch on every 16-bit pattern and on the float32 values that rounding often gets wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightsmith.errors import InputError
from weightsmith.tensors.floats import BLOCK, from_float32, parse_dtype, to_float32

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "F32": torch.float32}


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


def hard_values() -> np.ndarray:
    """Each 16-bit prefix with the suffixes at and beside the ties, of both 16-bit formats."""
    suffixes = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001]
    prefixes = np.arange(65536, dtype=np.uint32) << 16
    return np.concatenate([prefixes | suffix for suffix in suffixes]).view(np.float32)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_stored_pattern_widens_as_in_torch(dtype):
    raw = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(raw.view(np.int16)).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(to_float32(raw, dtype), expected)
    finite = np.isfinite(expected)
    got = to_float32(raw[finite], dtype)  # the route without infinities and NaN
    np.testing.assert_array_equal(got.view(np.uint32), expected[finite].view(np.uint32))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_narrowing_rounds_as_torch_does_bit_for_bit(dtype):
    values = hard_values()
    expected = torch.from_numpy(values).to(TORCH[dtype])
    got = from_float32(values, dtype).view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], expected.view(torch.int16).numpy().view(np.uint16)[~nan])
    assert np.isnan(to_float32(got[nan], dtype)).all()
    finite = values[np.isfinite(values)]  # no NaN in any block: the fast route of float16
    expected = torch.from_numpy(finite).to(TORCH[dtype]).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(from_float32(finite, dtype).view(np.uint16), expected)


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)), st.sampled_from(list(TORCH)))
def test_narrow_then_widen_agrees_with_torch(values, dtype):
    got = to_float32(from_float32(values, dtype), dtype)
    np.testing.assert_array_equal(got, torch.from_numpy(values).to(TORCH[dtype]).float().numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_arrays_longer_than_one_block_are_converted_to_the_last_element(dtype):
    values = np.linspace(-3, 3, BLOCK * 2 + 17, dtype=np.float32)
    raw = bits_of(torch.from_numpy(values).to(TORCH[dtype]))
    np.testing.assert_array_equal(from_float32(values, dtype).view(np.uint8), raw)
    out = np.full(values.size, np.nan, np.float32)
    assert to_float32(raw, dtype, out=out) is out
    np.testing.assert_array_equal(out, torch.from_numpy(values).to(TORCH[dtype]).float().numpy())


def test_the_callers_values_are_left_untouched():
    values = np.array([1.00390625, np.nan, 1e30], np.float32)
    before = values.copy()
    from_float32(values, "BF16")
    from_float32(values, "F16")
    np.testing.assert_array_equal(values, before)


def test_dtype_names_as_people_write_them():
    names = ["bfloat16", "torch.float16", "BF16", "fp32", "half", "F64"]
    assert [parse_dtype(name) for name in names] == ["BF16", "F16", "BF16", "F32", "F16", "F64"]
    with pytest.raises(InputError, match="did you mean `bfloat16`"):
        parse_dtype("bfloat61")


def test_integers_and_one_byte_floats_are_not_plain_weights():
    for dtype in ("I64", "F8_E4M3"):
        with pytest.raises(InputError, match=dtype):
            to_float32(np.zeros(8, np.uint8), dtype)
        with pytest.raises(InputError, match=dtype):
            from_float32(np.zeros(1, np.float32), dtype)
