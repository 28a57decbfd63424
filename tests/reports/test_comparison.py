"""Figures of many models side by side."""

from __future__ import annotations

import re

import pytest

from weightsmith.errors import InputError
from weightsmith.reports import draw_figures
from weightsmith.reports.comparison import LABEL, draw_figure
from weightsmith.reports.drawing import text_width


def dots(**rows):
    return {
        "kind": "dots",
        "title": "Gains",
        "axes": ["first", "second"],
        "order": "first",
        "rows": [{"name": name, "group": "merge", "values": values} for name, values in rows.items()],
    }


def scatter(*points):
    return {
        "kind": "scatter",
        "title": "Balance",
        "x": "helpful",
        "y": "safe",
        "points": [{"name": name, "group": group, "x": x, "y": y} for name, group, x, y in points],
    }


def names_from_above(chart, names):
    found = {name: float(re.search(rf'y="([\d.]+)"[^>]*>{name}</text>', chart)[1]) for name in names}
    return sorted(found, key=lambda name: found[name])


def test_the_best_on_the_axis_that_orders_stands_first():
    figure = dots(low=[[0.1, 0.2], [0.9]], high=[[0.8, 0.6], [0.1]], mid=[[0.4], [0.5]])
    assert names_from_above(draw_figure(figure), ["low", "mid", "high"]) == ["high", "mid", "low"]
    assert names_from_above(draw_figure({**figure, "order": "second"}), ["low", "mid", "high"]) == [
        "low",
        "mid",
        "high",
    ]


def test_a_dot_tells_mean_and_range_and_a_gap_draws_nothing():
    chart = draw_figure(dots(ties=[[0.5, 0.7], []]))
    assert "ties, first: 60.0 (50.0 to 70.0)" in chart
    assert "ties, second" not in chart


def test_what_lies_far_off_leaves_an_arrow_and_does_not_squeeze_the_rest():
    rows = {f"m{n}": [[0.5 + 0.01 * n], [0.5]] for n in range(8)}
    chart = draw_figure(dots(**rows, wreck=[[-9.0], [0.5]]))
    assert "◂" in chart
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"[^>]*><title>m\d, first', chart)]
    assert max(places) - min(places) > 60


def test_labels_of_a_scatter_do_not_overlap_and_each_point_has_its_tooltip():
    points = [(f"model {n}", "merge", 0.5 + 0.002 * n, 0.5) for n in range(30)]
    chart = draw_figure(scatter(*points))
    placed = [
        (float(x), float(y), name)
        for x, y, name in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="tick">(model \d+)<', chart)
    ]
    assert 2 <= len(placed) < 30
    for index, (x, y, name) in enumerate(placed):
        for other_x, other_y, _ in placed[:index]:
            assert abs(y - other_y) >= 13 or abs(x - other_x) >= text_width(name, LABEL) - 1
    assert len(re.findall(r"<title>model \d+: helpful", chart)) == 30


def test_a_group_has_one_colour_in_all_figures():
    figures = [dots(ties=[[0.1], [0.2]]), scatter(("mix", "mixture", 0.1, 0.2), ("ties", "merge", 0.3, 0.2))]
    page = draw_figures(figures)
    assert re.search(r'mark s0"><title>ties, first', page)
    assert re.search(r'mark s0"><title>ties: helpful', page)
    assert re.search(r'mark s1"><title>mix: helpful', page)
    assert page == draw_figures(figures)


@pytest.mark.parametrize(
    ("figure", "words"),
    [({"kind": "radar"}, "no kind `radar`; known: dots, scatter"), (scatter(), "`Balance`: no model")],
)
def test_a_figure_that_cannot_be_drawn_is_named(figure, words):
    with pytest.raises(InputError, match=words):
        draw_figures([figure])
