"""How fast this machine multiplies matrices: the unit in which predictions count time."""

from __future__ import annotations

import functools
import time


@functools.cache
def matmul_flops() -> float:
    """Floating point operations per second of one core in fp32 matrix products, measured in 20 ms."""
    import numpy as np

    rows, inner = 1024, 256
    a, b = np.ones((rows, inner), np.float32), np.ones((inner, inner), np.float32)
    a @ b  # wakes the thread pool
    rounds, started = 0, time.process_time()  # CPU time: the product may use several threads
    while (elapsed := time.process_time() - started) < 0.02:
        a @ b
        rounds += 1
    return 2.0 * rows * inner * inner * rounds / elapsed
