"""A search for a tailored model, in the report."""

import pytest

from weightsmith.reports.tailoring import _tailoring, draw_plan, plan_words

NAMES = ["base", "code", "english"]
PLAN = {
    "depth": 4,
    "layers": [
        {"layer": 0, "sources": []},
        {"layer": 1, "sources": [1, 2], "weight": 0.5},
        {"layer": 3, "sources": [2]},
    ],
}


class Stage:
    name = "smaller"


def trial(number, budget, costs, status="ok"):
    return {"id": number, "budget": budget, "costs": costs, "status": status, "configuration": PLAN}


def test_a_plan_in_words_and_as_boxes():
    assert plan_words(PLAN, NAMES) == "without 2; 0 base, 1 0.500 (code + english), 3 english"
    chart = str(draw_plan(PLAN, NAMES))
    assert chart.count('class="gone"') == 1
    assert chart.count('class="cell"') == 4  # the base, two for the blend, one fine-tune
    assert chart.count(">0.50<") == 2
    assert "layer 1: code + english, weight 0.500" in chart
    assert "layer 2: dropped" in chart


@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c")])
def test_the_table_has_the_plans_of_the_highest_budget_best_first(tasks):
    costs = {number: dict.fromkeys(tasks, 0.1 * number) for number in (1, 2, 3)}
    trials = [
        trial(0, 2, costs[1]),
        trial(1, 4, costs[3]),
        trial(2, 4, costs[2]),
        trial(3, 4, dict.fromkeys(tasks, 1.0), "failed"),
    ]
    plan = {
        "models": [{"name": name} for name in NAMES],
        "configuration": PLAN,
        "costs": costs[2],
        "budget": 4,
        "front": [{"trial": 2}],
        "settings": {"trial": 2},
    }
    made = _tailoring(Stage(), plan, trials)
    assert [(row.trial, row.on_front, row.chosen) for row in made.rows] == [
        (2, True, True),
        (1, False, False),
    ]
    assert made.rows[0].mean == pytest.approx(0.8)
    assert made.words.startswith("3 of 4 layers are kept, 1 of them blended; chosen among 1 plans")
    assert made.words.endswith("after 4 trials, of which 1 failed.")
    scatter, progress = made.panels
    assert str(scatter.chart).count("<circle") == 2
    assert "0.900 on 2 examples of each task, 0.800 on 4 examples" in progress.note
