"""A search for a tailored model, in the report."""

import re

import pytest

from weightsmith.reports import write_report
from weightsmith.reports.tailoring import _tailoring, draw_plan, plan_words
from weightsmith.runs import write_json

from .made_runs import RunFolder

RECIPE = "name: small\nstages:\n  smaller: {tailor: {base: base, candidates: [code], sparsity: 0.25}}\n"

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


def without(layer):
    """The base without a layer."""
    return {"depth": 4, "layers": [{"layer": n, "sources": []} for n in range(4) if n != layer]}


def trial(number, budget, costs, status="ok", plan=PLAN, error=None):
    return {
        "id": number, "budget": budget, "costs": costs, "status": status, "configuration": plan,
        "error": error, "seconds": 1.0,
    }  # fmt: skip


def searched(trials, chosen, front=None):
    """The plan of a search, as its stage keeps it."""
    one = next(one for one in trials if one["id"] == chosen)
    return {
        "models": [{"name": name} for name in NAMES],
        "configuration": one["configuration"],
        "costs": one["costs"],
        "budget": one["budget"],
        "front": [{"trial": number} for number in (front or [chosen])],
        "settings": {"trial": chosen},
    }


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
        trial(1, 4, costs[3], plan=without(0)),
        trial(2, 4, costs[2]),
        trial(3, 4, dict.fromkeys(tasks, 1.0), "failed", without(1), "Traceback\n  line\nKeyError: 'x'\n"),
    ]
    made = _tailoring(Stage(), searched(trials, 2), trials)
    assert [(row.trial, row.on_front, row.chosen) for row in made.rows] == [
        (2, True, True),
        (1, False, False),
    ]
    assert made.rows[0].mean == pytest.approx(0.8)
    assert made.words.startswith("3 of 4 layers are kept, 1 of them blended; chosen among 1 plans")
    assert made.words.endswith("after 4 trials of 3 plans, of which 1 failed.")
    scatter, progress = made.panels
    assert str(scatter.chart).count("<circle") == 2
    assert "0.900 on 2 examples of each task, 0.800 on 4 examples" in progress.note


def test_every_plan_that_was_tried_is_listed_once_with_its_last_trial():
    def costs(value):
        return {"a": value, "b": value}

    plans = [PLAN, *map(without, range(4)), {**PLAN, "layers": PLAN["layers"][:2]}]
    trials = [
        trial(0, 2, costs(0.3), plan=plans[0]),
        trial(1, 2, costs(0.2), plan=plans[1]),
        trial(2, 2, costs(0.7), plan=plans[2]),
        trial(3, 2, costs(1.0), "nonfinite", plans[3], "logits hold NaN"),
        trial(4, 2, costs(0.6), plan=plans[4]),
        trial(5, 2, costs(1.0), "failed", plans[5], "Traceback\n  line\nKeyError: 'x'\n"),
        trial(6, 4, costs(0.4), plan=plans[0]),
        trial(7, 4, costs(0.9), "stopped", plans[1]),
    ]
    made = _tailoring(Stage(), searched(trials, 6), trials)
    assert [row.trial for row in made.rows] == [6]
    assert [(row.trial, row.budget, row.remark, row.scores) for row in made.others] == [
        (7, 4, "given up", pytest.approx((0.1, 0.1))),
        (4, 2, "", pytest.approx((0.4, 0.4))),
        (2, 2, "", pytest.approx((0.3, 0.3))),
        (3, 2, "not finite: logits hold NaN", ()),
        (5, 2, "failed: KeyError: 'x'", ()),
    ]


def test_the_page_shows_all_plans_without_a_script(tmp_path):
    """Five hundred of them: those at the highest budget open, the others folded."""
    layers = [[{"layer": n, "sources": [1] if (k >> n) & 1 else []} for n in range(9)] for k in range(400)]
    trials = [
        trial(k, 2, {"a": k / 500, "b": 0.5}, "failed" if k == 7 else "ok", {"depth": 10, "layers": one})
        for k, one in enumerate(layers)
    ]
    trials += [
        trial(400 + k, 4, {"a": k / 500, "b": 0.5}, plan=trials[2 * k]["configuration"]) for k in range(100)
    ]
    run = RunFolder(tmp_path, RECIPE)
    folder = run.finish("smaller", "tailor", {"base": "base", "candidates": ["code"]})
    write_json(folder / "plan.json", searched(trials, 400))
    write_json(folder / "trials.json", trials)
    page = write_report(tmp_path).read_text()
    shown, folded = (
        re.findall(r'<tr><th scope="row">(\d+)</th><td>without 9', part) for part in page.split("<details>")
    )
    assert [int(number) for number in shown] == list(range(400, 500))
    assert len(folded) == 300
    assert not {*shown} & {*folded}
    assert "<summary>300 more plans were tried</summary>" in page
    assert '<td class="num">2</td><td class="num"></td><td class="num"></td><td class="num"></td>' in page
    assert '<td class="fail">failed</td>' in page
    assert "<script" not in page
