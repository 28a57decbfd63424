"""Numbers in print, ticks, scales and curves."""

from __future__ import annotations

import itertools
import math

import pytest

from weightsmith.reports import drawing
from weightsmith.reports.curves import loss_panel, search_panel, smoothed
from weightsmith.reports.folder import read_run

from .made_runs import quickstart


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.34, "0.3 s"),
        (9.99, "10 s"),
        (59.96, "1 min"),
        (71.2, "1 min 11 s"),
        (3599.7, "1 h"),
        (14000, "3 h 53 min"),
        (None, "–"),
    ],
)
def test_durations_read_like_speech(value, words):
    assert drawing.seconds(value) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_600, "1.0 MB"),
        (812_000_000, "812 MB"),
        (3.1e13, "31.00 TB"),
    ],
)
def test_sizes_change_unit_before_they_overflow_it(count, words):
    assert drawing.size(count) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (-0.25, "−0.25"), (0.1 + 0.2, "0.3"), (12345, "12 345"), (2e-5, "2e-05"), (3e9, "3e+09")],
)
def test_numbers_are_short(value, words):
    assert drawing.number(value) == words


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1.21, 1.46), (-3, 4000), (0.9999, 1.0001), (1e-9, 3e-9), (5, 5)]
)
def test_ticks_are_few_round_and_inside(low, high):
    values = drawing.ticks(low, high, 5)
    assert 1 <= len(values) <= 5
    assert all(low <= value <= high for value in values)
    if high > low:
        steps = {round((b - a) / (values[1] - values[0]), 6) for a, b in itertools.pairwise(values)}
        assert steps <= {1.0}


def test_a_log_scale_puts_the_geometric_mean_in_the_middle():
    scale = drawing.Scale(0.01, 100, 0, 10, log=True)
    assert scale(1.0) == pytest.approx(5)


def test_a_shortened_name_keeps_both_ends():
    short = drawing.shorten("a-rather-long-name-for-stage-27", 15)
    assert len(short) == 15
    assert short.startswith("a-rath")
    assert short.endswith("tage-27")
    assert drawing.shorten("short", 15) == "short"


def test_smoothing_keeps_a_constant_and_removes_an_alternation():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    wave = smoothed([1.0 + (-1) ** i for i in range(200)])
    assert max(abs(value - 1.0) for value in wave[20:-20]) < 0.1


def test_smoothing_does_not_draw_a_steep_start_late():
    falling = [math.exp(-i / 20) for i in range(400)]
    assert max(abs(a - b) for a, b in zip(smoothed(falling), falling, strict=True)) < 0.1


def test_losses_that_are_not_finite_are_counted_not_drawn(tmp_path):
    made = quickstart(tmp_path / "run")
    made.metrics("code", [2.0, 1.8, 1.7] * 10)
    with (made.folder / "stages" / "code" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN}\n{"step": 32, "loss": Infinity}\n')
    panel = loss_panel(read_run(made.folder).stage("code"))
    assert "nan" not in panel.chart.lower()
    assert panel.note == "2 steps had a loss that is not a finite number."


def test_a_long_curve_stays_small_and_keeps_its_spikes(tmp_path):
    made = quickstart(tmp_path / "run")
    losses = [1.0] * 20_000
    losses[12_345] = 9.0
    made.metrics("code", losses)
    panel = loss_panel(read_run(made.folder).stage("code"))
    assert len(panel.chart) < 15_000
    raw = panel.chart.split('class="raw"')[0].rsplit('d="M', 1)[1]
    heights = {float(point.split()[1].rstrip('"')) for point in raw.split("L")}
    assert len(heights) == 2


def test_a_stage_without_losses_has_no_panel(tmp_path):
    assert loss_panel(read_run(quickstart(tmp_path / "run").folder).stage("uniform")) is None


def test_the_chosen_strength_is_the_marked_one(tmp_path):
    panel = search_panel(read_run(quickstart(tmp_path / "run").folder).stage("arithmetic"))
    marked = [part for part in panel.chart.split("<circle ") if 'class="chosen"' in part]
    assert len(marked) == 1
    assert "weight 0.4: 1.9620" in marked[0]
    assert ">weight = 0.4<" in panel.chart


def test_a_search_over_two_options_shows_every_trial(tmp_path):
    made = quickstart(tmp_path / "run")
    trials = [
        {"options": {"density": d, "weight": w}, "score": d + w} for d in (0.2, 0.5) for w in (0.5, 1.0)
    ]
    made.write("ties", "search.json", trials)
    panel = search_panel(read_run(made.folder).stage("ties"))
    assert panel.chart.count("<circle ") == 4
    assert ">density 0.2, weight 1<" in panel.chart
