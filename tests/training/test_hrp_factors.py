"""Singular vectors of thin products: against the dense SVD, and what the product doesn't have."""

import pytest
import torch

from weightsmith.training.hrp.factors import defect, filled, principal, shared_ranks

SHAPES = {
    "tall": (40, 12, 5),
    "wide": (9, 30, 6),
    "few rows": (4, 20, 7),
    "few columns": (20, 4, 7),
    "square": (8, 8, 8),
}


def factors(rows, columns, rank, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, generator=random, dtype=torch.float64) for size in (rows, columns))
    return left.to(dtype), right.to(dtype)


def span(columns):
    return columns @ columns.mT


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_directions_are_those_of_the_dense_product(shape, dtype, close):
    left, right = factors(*shape, dtype)
    count = min(3, *shape)
    (u, s, v), known = principal(left, right, count)
    dense_u, dense_s, dense_vh = torch.linalg.svd(left.double() @ right.double().mT, full_matrices=False)
    assert known == count
    torch.testing.assert_close(span(v.double()), span(dense_vh[:count].mT), rtol=0, atol=close)
    torch.testing.assert_close(span(u.double()), span(dense_u[:, :count]), rtol=0, atol=close)
    most = min(shape)
    torch.testing.assert_close(s[:most].double(), dense_s[:most], rtol=close, atol=close)
    rebuilt = (u * s[:count]) @ v.mT
    best = (dense_u[:, :count] * dense_s[:count]) @ dense_vh[:count]
    torch.testing.assert_close(rebuilt.double(), best, rtol=0, atol=20 * close)


def test_the_largest_entry_of_each_direction_is_positive_whatever_the_signs_of_the_factors():
    left, right = factors(10, 14, 4)
    plain = principal(left, right, 3).triplets
    turned = principal(-left, -right, 3).triplets
    assert (plain.v.gather(0, plain.v.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(plain.v, turned.v)
    torch.testing.assert_close(plain.u, turned.u)


def test_sides_change_places_with_the_factors():
    left, right = factors(10, 14, 4)
    one, other = principal(left, right, 3).triplets, principal(right, left, 3).triplets
    torch.testing.assert_close(span(one.u), span(other.v))
    torch.testing.assert_close(span(one.v), span(other.u))


def test_directions_that_the_product_lacks_are_orthogonal_and_follow_from_the_seed():
    left, right = factors(10, 14, 5)
    left[:, 2:] = 0  # rank 2
    first = principal(left, right, 4, seed=1)
    again, other = principal(left, right, 4, seed=1), principal(left, right, 4, seed=2)
    assert first.known == 2
    assert defect(first.triplets.v) < 1e-12
    assert defect(first.triplets.u) < 1e-12
    assert torch.equal(first.triplets.v, again.triplets.v)
    assert torch.equal(first.triplets.v[:, :2], other.triplets.v[:, :2])
    assert not torch.allclose(first.triplets.v[:, 2:], other.triplets.v[:, 2:])
    nothing = principal(torch.zeros_like(left), right, 3)
    assert nothing.known == 0
    assert defect(nothing.triplets.v) < 1e-12


def test_more_columns_than_there_is_room_for_are_unit_columns():
    made = filled(torch.zeros(3, 0), 5, seed=0)
    assert made.shape == (3, 5)
    assert defect(made[:, :3]) < 1e-6
    torch.testing.assert_close(made.norm(dim=0), torch.ones(5))


def test_narrow_numbers_are_widened_first():
    left, right = factors(20, 16, 4, torch.bfloat16)
    found = principal(left, right, 2).triplets
    assert found.v.dtype == torch.float32
    assert defect(found.v) < 1e-5
    assert 1e-4 < defect(found.v.bfloat16()) < 0.05


def test_ranks_go_where_the_energy_is_spread_and_their_sum_stays():
    steep, flat = torch.tensor([10.0, 0.1, 0.1, 0.1]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert shared_ranks([steep, flat], [2, 2], 2.0) == [1, 3]
    assert shared_ranks([steep, flat], [2, 2], 1.0) == [2, 2]
    assert shared_ranks([torch.zeros(4), flat], [1, 3], 1.5) == [1, 3]
