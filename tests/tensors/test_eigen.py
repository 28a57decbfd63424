from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch

from weightsmith.tensors import eigen
from weightsmith.tensors.eigen import leading_eigenpairs
from weightsmith.tensors.spectra import one_thread


def symmetric(size, seed=0, dtype=torch.float64):
    rows = torch.randn(size, size + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows @ rows.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "number"), [(1, 1), (2, 1), (2, 2), (3, 2), (40, 13), (40, 40), (150, 50)])
def test_pairs_are_those_of_a_full_decomposition(size, number, dtype):
    matrix = symmetric(size, dtype=dtype)
    before = matrix.clone()
    values, vectors = leading_eigenpairs(matrix, number)
    expected = torch.linalg.eigvalsh(matrix.double())
    tolerance = (1e-5 if dtype == torch.float32 else 1e-13) * float(expected[-1])
    assert values.dtype == vectors.dtype == dtype
    assert vectors.shape == (size, number)
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=tolerance)
    away = matrix @ vectors - vectors * values[-number:]
    assert away.abs().max() < tolerance
    torch.testing.assert_close(
        vectors.mT @ vectors,
        torch.eye(number, dtype=dtype),
        rtol=0,
        atol=1e-5 if away.element_size() == 4 else 1e-13,
    )
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    "matrix", [torch.diag(torch.tensor([3.0, 1.0, 2.0])), torch.eye(5), torch.zeros(4, 4)]
)
def test_matrices_that_are_diagonal_already(matrix):
    values, vectors = leading_eigenpairs(matrix, 2)
    assert torch.equal(values, matrix.diagonal().sort().values)
    torch.testing.assert_close(matrix @ vectors, vectors * values[-2:])


def test_batches_and_views_keep_their_shapes():
    matrices = torch.stack([symmetric(12, seed) for seed in range(6)]).reshape(2, 3, 12, 12)
    values, vectors = leading_eigenpairs(matrices.mT, 5)
    assert (values.shape, vectors.shape) == ((2, 3, 12), (2, 3, 12, 5))
    one, its = leading_eigenpairs(matrices[1, 2], 5)
    assert torch.equal(values[1, 2], one)
    assert torch.equal(vectors[1, 2], its)


def test_workers_side_by_side_find_the_same_bits():
    matrix = symmetric(200, dtype=torch.float32)

    def work(_):
        with one_thread():
            return leading_eigenpairs(matrix, 60)

    with one_thread():
        values, vectors = leading_eigenpairs(matrix, 60)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(8)):
            assert torch.equal(found[0], values)
            assert torch.equal(found[1], vectors)


def test_lapack_has_one_thread_while_anybody_is_at_work():
    def threads():
        return {library.num_threads for library in eigen._libraries()}

    def work(arrive, leave):
        with one_thread():
            arrive.wait()
            found = threads()
            leave.wait()
        return found

    before = [library.num_threads for library in eigen._libraries()]
    eigen._set_threads([2] * len(before))
    try:
        leading_eigenpairs(symmetric(20), 3)
        assert threads() == {2}
        for _ in range(2):  # threads that come and go, after this one has set a number
            together, first, second = Barrier(2), Event(), Event()
            with ThreadPoolExecutor(2) as pool:
                jobs = [pool.submit(work, together, leave) for leave in (first, second)]
                first.set()
                assert jobs[0].result() == {1}
                assert threads() == {1}
                second.set()
                assert jobs[1].result() == {1}
            assert threads() == {2}
    finally:
        eigen._set_threads(before)


def test_an_error_of_lapack_is_raised():
    with pytest.raises(torch.linalg.LinAlgError, match="ssytrd failed with info -2"):
        eigen._call(b"ssytrd", b"L", -1, *[torch.empty(1)] * 1, 1, *[torch.empty(1)] * 4, 1)
