from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.tensors.spectra import (
    _wide_svd,
    gram,
    one_thread,
    singular_values,
    stable_rank,
    truncated_svd,
    whiten,
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(rows, columns, seed):
    return torch.linalg.qr(random(rows, columns, seed=seed))[0]


def with_spectrum(rows, columns, values, seed=0):
    """A matrix (rows, columns) with these singular values."""
    number = len(values)
    return (orthonormal(rows, number, seed) * values) @ orthonormal(columns, number, seed + 1).mT


def best(matrix, rank):
    """The best approximation of this rank, by LAPACK's full SVD in fp64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def product(triplets):
    u, s, v = (part.double() for part in triplets)
    return (u * s[..., None, :]) @ v.mT


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24), (1, 9), (9, 1)])
@pytest.mark.parametrize("share", [0.15, 0.34, 1.0])
def test_triplets_are_those_of_a_full_svd(shape, share):
    matrix = random(*shape)
    rank = max(1, int(share * min(shape)))
    u, s, v = found = truncated_svd(matrix, rank)
    torch.testing.assert_close(product(found), best(matrix, rank), rtol=0, atol=1e-11)
    torch.testing.assert_close(s, torch.linalg.svdvals(matrix)[:rank], rtol=1e-10, atol=0)
    torch.testing.assert_close(u.mT @ u, torch.eye(rank).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(v.mT @ v, torch.eye(rank).double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.75, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("rank", [20, 48])
def test_float32_keeps_its_accuracy_however_steep_the_spectrum_is(decay, rank):
    values = torch.arange(1, 97, dtype=torch.float64) ** -decay * torch.linspace(1, 0.9, 96).double()
    matrix = with_spectrum(96, 128, values)
    u, s, v = found = truncated_svd(matrix.float(), rank)
    assert (product(found) - best(matrix, rank)).norm() < 2e-4 * values.norm()
    kept = s > 0
    torch.testing.assert_close(s[kept].double(), values[:rank][kept], rtol=2e-3, atol=0)
    assert (u[:, kept].mT @ u[:, kept] - torch.eye(int(kept.sum()))).abs().max() < 1e-4
    assert (v[:, kept].mT @ v[:, kept] - torch.eye(int(kept.sum()))).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [12, 30])
def test_directions_that_are_only_rounding_are_dropped_as_zeros(dtype, rank):
    matrix = with_spectrum(60, 80, torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double()).to(dtype)
    u, s, v = truncated_svd(matrix, rank)
    assert (s > 0).sum() == 5
    assert not u[:, 5:].any()
    assert not v[:, 5:].any()
    torch.testing.assert_close(s[:5].double(), torch.arange(5.0, 0.0, -1).double(), rtol=1e-5, atol=0)


def test_a_matrix_of_zeros_has_no_triplets():
    assert not any(part.any() for part in truncated_svd(torch.zeros(2, 30, 8), 3))


def test_a_batch_is_its_matrices_one_by_one():
    matrices = random(2, 3, 20, 30, dtype=torch.float32)
    matrices[1, 2] = with_spectrum(20, 30, torch.tensor([3.0, 1.0, 0.5]).double()).float()
    together = truncated_svd(matrices, 8)
    alone = truncated_svd(matrices[1, 2], 8)
    for one, all_of_them in zip(alone, together, strict=True):
        assert torch.equal(one, all_of_them[1, 2])


@pytest.mark.parametrize("rank", [6, 20])
def test_a_batch_done_at_once_as_on_a_gpu_sorts_out_its_matrices(rank):
    ranks = torch.arange(1, 49, dtype=torch.float64)
    matrices = torch.stack(
        [
            random(48, 64),
            with_spectrum(48, 64, ranks**-2.0, seed=2),  # needs fp64
            with_spectrum(48, 64, ranks**-0.7, seed=4),  # needs a second look
            with_spectrum(48, 64, torch.tensor([3.0, 2.0, 1.0]).double(), seed=6),  # low rank
            torch.zeros(48, 64),
        ]
    )
    found = _wide_svd(matrices.float(), rank, "auto", 0)
    for place, matrix in enumerate(matrices):
        one = tuple(part[place] for part in found)
        assert (product(one) - best(matrix, rank)).norm() <= 2e-4 * matrix.norm()
        alone = truncated_svd(matrix.float(), rank)
        torch.testing.assert_close(one[1], alone.s, rtol=2e-3, atol=1e-6)


def test_the_sketch_finds_a_low_rank_matrix_and_is_reproducible():
    matrix = with_spectrum(80, 100, torch.tensor([9.0, 5.0, 2.0, 1.0]).double()).float()
    found = truncated_svd(matrix, 6, route="sketch", seed=3)
    torch.testing.assert_close(product(found), matrix.double(), rtol=0, atol=1e-4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, truncated_svd(matrix, 6, route="sketch", seed=3), strict=True)
    )


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_a_sketch_that_misses_directions_is_not_used(decay):
    values = torch.arange(1, 81, dtype=torch.float64) ** -decay
    matrix = with_spectrum(80, 100, values)
    found = truncated_svd(matrix, 10)  # 10 < 80 / 4: starts with a sketch
    torch.testing.assert_close(product(found), best(matrix, 10), rtol=0, atol=1e-9 * float(values.norm()))
    sketched = truncated_svd(matrix, 10, route="sketch")
    assert (product(sketched) - best(matrix, 10)).norm() > 1e-6 * values.norm()


def test_one_thread_gives_the_same_bits_whatever_the_caller_had_set():
    matrix = random(150, 200, dtype=torch.float32)
    results = []

    def work(threads):
        torch.set_num_threads(threads)
        with one_thread():
            inside = torch.get_num_threads()
            results.append(truncated_svd(matrix, 50))
        assert (inside, torch.get_num_threads()) == (1, threads)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            list(pool.map(work, (1, 2, 3)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_whitening_gives_the_polar_factor():
    columns = random(50, 20)
    columns /= columns.norm(dim=0)
    u, _, vh = torch.linalg.svd(columns, full_matrices=False)
    torch.testing.assert_close(whiten(columns), u @ vh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shortest", [0.3, 1e-2, 1e-3])
def test_float32_whitening_stands_nearly_dependent_columns(shortest):
    values = torch.linspace(1.4, shortest, 40).double()
    exact = with_spectrum(60, 40, values, seed=5) @ orthonormal(40, 40, 9)
    u, _, vh = torch.linalg.svd(exact, full_matrices=False)
    found = whiten(exact.float()).double()
    assert (found.mT @ found - torch.eye(40)).abs().max() < 2e-4
    assert (found - u @ vh).norm() < 1e-3 * 40**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_columns_share_their_directions_equally(dtype):
    one = orthonormal(30, 6, 1).to(dtype)
    shares = whiten(torch.cat([one, one, one], dim=1)).reshape(30, 3, 6)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for share in shares.unbind(1):
        torch.testing.assert_close(share, one / 3**0.5, rtol=0, atol=tolerance)


def test_singular_values_and_stable_rank_match_their_definitions():
    matrix = random(2, 12, 30, dtype=torch.float32)
    values = singular_values(matrix)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()), rtol=1e-7, atol=0)
    expected = matrix.double().square().sum((-2, -1)) / values[:, 0] ** 2
    torch.testing.assert_close(stable_rank(values), expected)
    assert stable_rank(singular_values(torch.zeros(3, 4))) == 0
    torch.testing.assert_close(stable_rank(torch.ones(5)).item(), 5.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rank", [1, 6])
def test_a_matrix_that_is_not_finite_is_refused(bad, rank):
    matrix = random(12, 16, dtype=torch.float32)
    matrix[3, 4] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        truncated_svd(matrix, rank)
    with pytest.raises(InputError, match="NaN or infinity"):
        singular_values(matrix)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"1\.\.min"):
        truncated_svd(torch.ones(4, 9), rank)


@pytest.mark.parametrize("shape", [(5, 7), (300, 40), (1030, 65), (2, 3, 517, 1100), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_multiplies_half_and_gives_the_whole_product(shape, dtype):
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = wide.double() @ wide.double().mT
    for one in (wide, wide.mT.contiguous().mT):
        found = gram(one, dtype)
        assert found.dtype == dtype
        assert found.shape == exact.shape
        # Sums over at most 1,100 products of numbers around 1.
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=1e-11 if dtype == torch.float64 else 2e-3
        )
