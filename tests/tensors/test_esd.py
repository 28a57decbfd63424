"""Spectra and their tails: closed forms, invariances, and the precision of the Gram route."""

import math

import numpy as np
import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.tensors.esd import alpha_hill, alpha_hill_square, by_shape, esd, hill


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(singular, columns, seed=0):
    """A matrix with these singular values."""
    rows = len(singular)
    left, _ = torch.linalg.qr(normal(rows, rows, seed=seed, dtype=torch.float64))
    right, _ = torch.linalg.qr(normal(columns, rows, seed=seed + 1, dtype=torch.float64))
    return left * torch.as_tensor(singular, dtype=torch.float64) @ right.mT


def plain_hill(eigenvalues, convention):
    """The estimator, written from its two definitions with a loop."""
    values = sorted(eigenvalues)
    number = len(values)
    if convention == "code":
        threshold, tail = values[number // 2], values[number // 2 :]
    else:
        threshold, tail = values[number - number // 2 - 1], values[number - number // 2 :]
    return 1 + len(tail) / sum(math.log(value / threshold) for value in tail)


def marchenko_pastur_alpha(ratio, points=200_000):
    """Hill exponent of the upper half of the Marchenko-Pastur law with aspect ratio Q / N, by quadrature."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # A substitution that takes the square root at both edges away.
    angle = (np.arange(points) + 0.5) / points * math.pi
    x = (low + high) / 2 + (high - low) / 2 * np.cos(angle)
    density = ((high - low) / 2 * np.sin(angle)) ** 2 / x
    density /= density.sum()
    share = np.cumsum(density)  # from the top
    median = x[np.searchsorted(share, 0.5)]
    upper = x >= median
    return 1 + density[upper].sum() / (density[upper] * np.log(x[upper] / median)).sum()


def test_eigenvalues_1_2_4_8_have_the_exponents_worked_out_by_hand():
    eigenvalues = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert hill(eigenvalues).item() == pytest.approx(1 + 2 / math.log(2), abs=1e-12)
    paper = 1 + 2 / (math.log(2) + math.log(4))
    assert hill(eigenvalues, convention="paper").item() == pytest.approx(paper, abs=1e-12)


@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize("number", [3, 4, 5, 8, 51])
def test_hill_equals_a_plain_loop_for_even_and_odd_lengths(number, convention):
    eigenvalues = normal(3, number, seed=number).exp().sort(-1).values
    expected = [plain_hill(row.tolist(), convention) for row in eigenvalues.double()]
    torch.testing.assert_close(
        hill(eigenvalues, convention=convention), torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0])
@pytest.mark.parametrize("tail_fraction", [0.1, 0.5, 0.9])
def test_hill_finds_the_exponent_of_a_power_law(exponent, tail_fraction):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sample = uniform.pow(-1 / (exponent - 1)).sort().values
    tolerance = 0.03 * max(1.0, exponent - 1) if tail_fraction > 0.3 else 0.12
    assert hill(sample, tail_fraction=tail_fraction).item() == pytest.approx(exponent, abs=tolerance)


@pytest.mark.parametrize(("rows", "columns"), [(512, 512), (512, 1024), (512, 1376), (512, 2048)])
def test_a_gaussian_matrix_has_the_exponent_of_its_aspect_ratio(rows, columns):
    expected = marchenko_pastur_alpha(rows / columns)
    alphas = [alpha_hill(normal(rows, columns, seed=seed)).item() for seed in range(4)]
    assert np.mean(alphas) == pytest.approx(expected, abs=0.03)


def test_the_exponent_ignores_scale_transposition_and_rotation():
    matrix = normal(64, 100, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(normal(64, 64, seed=5, dtype=torch.float64))
    alpha = alpha_hill(matrix)
    for other in (matrix.mT, 1e-3 * matrix, rotation @ matrix):
        torch.testing.assert_close(alpha_hill(other), alpha, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 1e30])
def test_squares_neither_overflow_nor_vanish(scale):
    matrix = normal(64, 64)
    torch.testing.assert_close(alpha_hill(matrix * scale), alpha_hill(matrix), rtol=0, atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0, 3.0, 3.5])
def test_the_gram_route_agrees_with_singular_values_whatever_the_condition(decay):
    """At decay 2 and beyond an fp32 Gram matrix alone is off by 0.08: the fp64 route must have taken over."""
    singular = torch.arange(1, 129, dtype=torch.float64).pow(-decay) * (1 + 0.01 * normal(128).double().abs())
    matrix = with_spectrum(singular.tolist(), 200).float()
    exact = hill(torch.linalg.svdvals(matrix.double()).square().flip(-1))
    torch.testing.assert_close(alpha_hill(matrix), exact, rtol=2e-5, atol=1e-4)


def test_esd_is_the_squared_singular_values_in_ascending_order():
    matrices = normal(2, 3, 20, 12)
    expected = torch.linalg.svdvals(matrices.double()).square().flip(-1)
    torch.testing.assert_close(esd(matrices), expected, rtol=1e-4, atol=1e-4)
    assert esd(matrices).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_measured_as_the_numbers_they_hold(dtype):
    matrix = normal(60, 80, dtype=dtype)
    torch.testing.assert_close(alpha_hill(matrix), alpha_hill(matrix.float()), rtol=0, atol=1e-6)
    assert matrix.dtype == dtype


def test_zeros_below_the_tail_change_nothing_and_zeros_inside_are_left_out():
    values = torch.arange(1, 101, dtype=torch.float64)
    padded = torch.cat([torch.zeros(30, dtype=torch.float64), values[30:]])
    assert hill(padded) == hill(values)
    reaching = torch.cat([torch.zeros(60, dtype=torch.float64), values[60:]])
    logs = values[60:].log() - values[60].log()
    torch.testing.assert_close(hill(reaching), 1 + 40 / logs.sum())
    logs = values[61:].log() - values[60].log()
    torch.testing.assert_close(hill(reaching, convention="paper"), 1 + 39 / logs.sum())


@pytest.mark.parametrize(("rank", "fits"), [(0, False), (1, False), (20, False), (40, True), (70, True)])
def test_a_matrix_of_low_rank_has_no_exponent(rank, fits):
    matrix = normal(100, max(rank, 1)) @ normal(max(rank, 1), 120, seed=1) * (rank > 0)
    assert math.isfinite(alpha_hill(matrix).item()) is fits


def test_a_flat_spectrum_has_an_infinite_exponent():
    orthogonal, _ = torch.linalg.qr(normal(80, 80))
    assert math.isinf(alpha_hill(orthogonal).item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad):
    matrix = normal(8, 8)
    matrix[3, 4] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        esd(matrix)


@pytest.mark.parametrize(("number", "fraction"), [(1, 0.5), (4, 0.1), (4, 0.0), (4, 1.0)])
def test_a_spectrum_without_a_tail_is_refused(number, fraction):
    with pytest.raises(ValueError, match="tail"):
        hill(torch.ones(number), tail_fraction=fraction)


def test_square_blocks_take_the_aspect_ratio_out_of_the_exponent():
    long = alpha_hill_square(normal(100, 400), seed=0)
    square = alpha_hill(normal(100, 100, seed=1))
    assert long.item() == pytest.approx(square.item(), abs=0.1)
    assert alpha_hill(normal(100, 400)).item() > square.item() + 1
    assert alpha_hill_square(normal(400, 100), seed=3) == alpha_hill_square(normal(400, 100), seed=3)


def test_batches_hold_equal_shapes_and_fit_the_bound():
    shapes = [(4, 4), (4, 8), (4, 4), (4, 4), (4, 8)]
    assert by_shape(shapes, max_elements=32) == [[0, 2], [3], [1], [4]]
    assert by_shape(shapes, max_elements=1) == [[0], [2], [3], [1], [4]]
