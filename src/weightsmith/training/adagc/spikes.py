"""Spike score: how often a series of losses or gradient norms jumps away from its recent past.

Source   OLMo 2 (arXiv:2501.00656) counts points at least 7 standard deviations from the rolling mean of the
         last 1000; AdaGC (arXiv:2502.11034) reports it at 10. Decided here: the mean and population deviation
         are of the `window` points before the one that is judged; the first `window` points can't be judged
         and count nowhere; where the past is constant, any other value is a spike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith.errors import InputError


def spike_score(
    series: Sequence[float] | np.ndarray, window: int = 1000, k: float = 10.0, two_sided: bool = True
) -> float:
    """Share of points, in percent, that lie at least `k` deviations from the mean of the `window` points
    before.

    Args:
        series: One value for each step. A point that is not finite is a spike, and later windows leave it
            out.
        window: Points of the past.
        k: Deviations that make a spike.
        two_sided: Count drops too; otherwise rises only.

    Returns:
        Percent of the judged points; NaN when the series is not longer than the window.

    Raises:
        InputError: `window` below 2, `k` not above 0, or a series that is not one-dimensional.

    Example:
        >>> spike_score([1.0, 1.1, 0.9, 1.0, 9.0, 1.0], window=4, k=7)
        50.0
    """
    if window < 2 or not k > 0:
        raise InputError(f"spike_score needs window >= 2 and k > 0, got {window} and {k}")
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"spike_score needs one value for each step, got shape {values.shape}")
    if len(values) <= window:
        return float("nan")
    spikes = 0
    for now in range(window, len(values)):
        past = values[now - window : now]
        past = past[np.isfinite(past)]
        if not np.isfinite(values[now]) or len(past) == 0:
            spikes += 1
            continue
        distance = values[now] - past.mean()
        deviation = past.std()
        reached = abs(distance) >= k * deviation if deviation > 0 else distance != 0
        spikes += bool(reached and (two_sided or distance > 0))
    return 100.0 * spikes / (len(values) - window)
