"""The spike score against a loop, and on the series where it is easy to get wrong."""

import math
import statistics

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.training.adagc.spikes import spike_score


def brute(series, window, k, two_sided):
    hits = []
    for now in range(window, len(series)):
        past = series[now - window : now]
        mean, deviation = statistics.fmean(past), statistics.pstdev(past)
        distance = series[now] - mean
        hits.append((abs(distance) if two_sided else distance) >= k * deviation and distance != 0)
    return 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("two_sided", [True, False])
def test_it_counts_what_a_loop_counts(two_sided):
    noise = np.random.default_rng(0)
    series = noise.standard_t(2, size=300).tolist()
    found = spike_score(series, window=20, k=3.0, two_sided=two_sided)
    assert 0 < found < 20
    assert found == pytest.approx(brute(series, 20, 3.0, two_sided))


def test_the_first_window_is_not_judged():
    assert spike_score([9.0, -9.0, 9.0, -9.0, 0.0], window=4, k=2.0) == 0.0
    assert math.isnan(spike_score([1.0, 2.0], window=4))


def test_a_constant_past_makes_any_change_a_spike():
    assert spike_score([1.0] * 5 + [1.0, 1.1], window=5, k=10) == 50.0


def test_a_point_that_is_not_finite_is_a_spike_and_spoils_no_later_window():
    assert spike_score([1.0, 1.1, 0.9, 1.0, math.nan, 1.0, math.inf], window=4, k=7) == pytest.approx(200 / 3)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="window >= 2"):
        spike_score([1.0], window=1)
    with pytest.raises(InputError, match="one value for each step"):
        spike_score(np.ones((2, 2)), window=2)
