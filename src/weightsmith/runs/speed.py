"""How fast this machine multiplies matrices: the unit in which predictions count time."""

from __future__ import annotations

import functools
import time


@functools.cache
def matmul_flops() -> float:
    """Floating point operations per second of one core in fp32 matrix products, measured in 20 ms.

    The product is too small for BLAS to split it over threads, and the best of many rounds counts, so neither
    the number of threads nor other work on the machine moves the result much.
    """
    import numpy as np

    size, calls = 64, 100
    a, out = np.ones((size, size), np.float32), np.empty((size, size), np.float32)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(calls):
            np.matmul(a, a, out=out)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 * calls / best
