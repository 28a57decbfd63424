"""Leading eigenvectors of symmetric matrices. Imports torch, and on a CPU scipy for its LAPACK.

Problem  `torch.linalg.eigh` turns back every eigenvector of the tridiagonal form, the most expensive of its
         three steps; a truncated SVD of one of T tasks wants a T-th of them.
Method   On a CPU the three steps of LAPACK's `syevd` one by one: reduction (`sytrd`), divide and conquer
         (`stedc`), and the way back (`torch.ormqr`) for the wanted vectors alone. Elsewhere
         `torch.linalg.eigh`.
Threads  LAPACK is called by way of `scipy.linalg.cython_lapack`, without the interpreter's lock, which
         scipy's own functions hold: workers of a merge would wait for one another.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LARGEST = 2**15  # sizes of work space are 32-bit integers
_BLOCK = 64  # columns that LAPACK reduces at once, at most


def leading_eigenpairs(matrices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues and the eigenvectors of the largest ones.

    Args:
        matrices: Symmetric, finite, fp32 or fp64 (..., Q, Q).
        number: Vectors wanted, 1 <= number <= Q.

    Returns:
        Eigenvalues (..., Q), the smallest first, and vectors (..., Q, number) that belong to the last of
        them.

    Raises:
        torch.linalg.LinAlgError: LAPACK failed.
    """
    size = matrices.shape[-1]
    if matrices.device.type != "cpu" or size > _LARGEST:
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors[..., -number:]
    pairs = [_lapack(matrix, number) for matrix in matrices.reshape(-1, size, size)]
    lead = matrices.shape[:-2]
    values, vectors = (torch.stack(side) if lead else side[0] for side in zip(*pairs, strict=True))
    return values.reshape(*lead, size), vectors.reshape(*lead, size, number)


def _lapack(matrix: Tensor, number: int) -> tuple[Tensor, Tensor]:
    size = len(matrix)
    letter = {torch.float32: b"s", torch.float64: b"d"}[matrix.dtype]
    # LAPACK counts columns first: of a symmetric matrix nothing changes, vectors come as rows.
    reduced = matrix.clone(memory_format=torch.contiguous_format)
    values, beside, scales = (matrix.new_empty(size) for _ in range(3))
    work = matrix.new_empty(1 + 4 * size + size * size)
    block = matrix.new_empty(_BLOCK * size)
    vectors = matrix.new_empty(size, size)
    places = torch.empty(3 + 5 * size, dtype=torch.int32)
    spaces = (work, len(work), places, len(places))
    with one_lapack_thread:
        _call(letter + b"sytrd", b"L", size, reduced, size, values, beside, scales, block, len(block))
        _call(letter + b"stedc", b"I", size, values, beside, vectors, size, *spaces)
    wanted = vectors[size - number :].mT
    # The first row is one of its own: reflections begin below it.
    wanted[1:] = torch.ormqr(reduced.mT[1:, :-1], scales[:-1], wanted[1:])
    return values, wanted


def _call(name: bytes, *arguments: bytes | int | Tensor) -> None:
    """A LAPACK routine, whose arguments all are addresses and the last of which reports an error."""
    held = [
        ctypes.c_char(one) if isinstance(one, bytes) else ctypes.c_int(one) if isinstance(one, int) else one
        for one in arguments
    ]
    info = ctypes.c_int()
    addresses = [
        one.data_ptr() if isinstance(one, Tensor) else ctypes.addressof(one) for one in (*held, info)
    ]
    _routine(name.decode(), len(addresses))(*addresses)
    if info.value:
        raise torch.linalg.LinAlgError(f"LAPACK's {name.decode()} failed with info {info.value}")


@functools.cache
def _routine(name: str, num_arguments: int) -> Callable[..., None]:
    from scipy.linalg import cython_lapack

    api = ctypes.pythonapi
    named = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    pointed = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", api)
    )
    capsule = cython_lapack.__pyx_capi__[name]
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * num_arguments)
    return prototype(pointed(capsule, named(capsule)))


class _OneThread:
    """LAPACK on one thread while anybody is inside: its own threads and torch's would wait for each other's
    cores, and how sums are split over threads shows in their last bits.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [library.num_threads for library in _libraries()]
                _set_threads([1] * len(self._before))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _set_threads(self._before)


one_lapack_thread = _OneThread()


@functools.cache
def _libraries() -> list[Any]:
    """What controls the BLAS libraries of this process."""
    from scipy.linalg import cython_lapack  # noqa: F401  # only loaded libraries are found
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers


def _set_threads(numbers: Sequence[int]) -> None:
    from threadpoolctl import OpenBLASController

    # OpenBLAS has one number for all threads, and threadpoolctl lets but the first thread set it: here the
    # last to leave need not be the first that came.
    OpenBLASController.clear_controlling_thread(force=True)
    for library, number in zip(_libraries(), numbers, strict=True):
        library.set_num_threads(number)
    OpenBLASController.clear_controlling_thread(force=True)
