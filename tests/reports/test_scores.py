"""The table of scores: who is who, which way a change went, what is best."""

from __future__ import annotations

import pytest

from weightsmith.reports.folder import read_run
from weightsmith.reports.scores import score_tables

from .made_runs import BITS, RunFolder, bits, quickstart, skills_of_a_users_models


@pytest.fixture
def table(tmp_path):
    return score_tables(read_run(quickstart(tmp_path / "run").folder))[0]


def cell(table, model, column):
    row = next(row for row in table.rows if row.name == model)
    return row.cells[[entry.task for entry in table.columns].index(column)]


def test_every_model_has_its_role(table):
    roles = {row.name: row.role for row in table.rows}
    assert roles["base"] == "base"
    assert {roles[name] for name in ("code", "english", "codecs", "unicode")} == {"fine-tune"}
    assert {roles[name] for name in ("uniform", "arithmetic", "ties", "tsvm", "resm")} == {"merge"}
    assert roles["joint"] == "control"


def test_merges_stand_best_mean_first_and_the_rest_in_page_order(table):
    assert [row.name for row in table.of_role("merge")] == ["resm", "tsvm", "arithmetic", "uniform", "ties"]
    assert [row.name for row in table.of_role("fine-tune")] == ["code", "english", "codecs", "unicode"]


def test_the_mean_is_over_all_tasks_and_compared_like_them(table):
    mean = cell(table, "tsvm", None)
    assert mean.value == pytest.approx(sum(BITS["tsvm"]) / 4)
    assert mean.change == pytest.approx((sum(BITS["base"]) - sum(BITS["tsvm"])) / sum(BITS["base"]))


def test_fewer_bits_are_an_improvement_and_print_with_a_minus(table):
    own = cell(table, "code", "source")
    assert own.change == pytest.approx((2.803 - 2.561) / 2.803)
    assert table.columns[1].show_change(own.change) == "−8.6 %"
    assert cell(table, "code", "docs").change < 0


def test_best_of_a_column_counts_all_models_and_best_merge_only_merges(table):
    best = {
        column.task: [row.name for row in table.rows if cell(table, row.name, column.task).best]
        for column in table.columns
    }
    assert best == {
        None: ["joint"],
        "source": ["joint"],
        "docs": ["joint"],
        "tables": ["joint"],
        "names": ["unicode"],
    }
    assert [row.name for row in table.rows if cell(table, row.name, "tables").best_merge] == ["tsvm"]
    assert [row.name for row in table.rows if cell(table, row.name, None).best_merge] == ["resm"]


def test_only_a_fine_tunes_own_task_is_marked_as_its_own(table):
    own = [
        (row.name, column.task)
        for row in table.rows
        for column, entry in zip(table.columns, row.cells, strict=True)
        if entry.own
    ]
    assert own == [("code", "source"), ("english", "docs"), ("codecs", "tables"), ("unicode", "names")]


def test_two_metrics_are_never_averaged_and_a_missing_score_leaves_the_mean_open(tmp_path):
    made = skills_of_a_users_models(tmp_path / "run")
    table = score_tables(read_run(made.folder))[0]
    assert [(column.task, column.metric) for column in table.columns] == [
        (None, "exact_match"),
        ("add", "exact_match"),
        ("sort", "exact_match"),
        ("docs", "bits_per_character"),
    ]
    assert cell(table, "org/other-7b", None).value == pytest.approx(0.31)
    assert cell(table, "org/other-7b", "docs").value is None
    assert cell(table, "merged", "docs").best is False
    assert table.base is None
    assert cell(table, "merged", "add").change is None


def test_a_mean_needs_every_task(tmp_path):
    made = RunFolder(tmp_path / "run", "stages:\n  s: {evaluate: {models: [a/b, c/d], tasks: all}}\n")
    made.finish("s", "evaluate", {})
    made.scores("s", {"a/b": bits([2.0, 1.0], ["docs", "names"]), "c/d": bits([0.5], ["docs"])})
    table = score_tables(read_run(made.folder))[0]
    assert cell(table, "a/b", None).value == 1.5
    assert cell(table, "c/d", None).value is None


def test_a_share_changes_in_points_and_knows_its_noise(tmp_path):
    page = """\
stages:
  m: {merge: {method: ties, base: org/b, models: [org/x]}}
  s: {evaluate: {models: [m, org/b], tasks: all}}
"""
    made = RunFolder(tmp_path / "run", page)
    made.finish("m", "merge", {"method": "ties", "base": "org/b"})
    made.finish("s", "evaluate", {})
    score = {"metric": "exact_match", "higher_is_better": True, "n": 400, "chance": 0.01}
    made.scores("s", {"org/b": {"add": score | {"value": 0.02}}, "m": {"add": score | {"value": 0.04}}})
    table = score_tables(read_run(made.folder))[0]
    merged = cell(table, "m", "add")
    assert merged.change == pytest.approx(0.02)
    assert merged.stderr == pytest.approx((0.04 * 0.96 / 400) ** 0.5)
    assert table.columns[0].show_change(merged.change) == "+2.0 pts"
    assert table.columns[0].chance == 0.01


def test_one_ruined_model_does_not_wash_out_the_colours_of_the_others(tmp_path):
    made = quickstart(tmp_path / "run")
    scores = {name: bits(values) for name, values in BITS.items()}
    scores["ties"] = bits([40.0, 50.0, 60.0, 70.0])
    made.scores("scores", scores)
    assert score_tables(read_run(made.folder))[0].span == 0.25


def test_a_fine_tune_on_a_group_of_skills_is_no_control(tmp_path):
    page = """\
stages:
  base: {train: {model: testbed/s, data: skills}}
  strings: {finetune: {model: base, data: strings}}
  lookup: {finetune: {model: base, data: [{source: lookup, weight: 2.0}]}}
  joint: {finetune: {model: base, data: [strings, lookup]}}
  m: {merge: {method: ties, base: base, models: [strings, lookup]}}
  s: {evaluate: {models: [base, strings, lookup, joint, m], tasks: skills}}
"""
    made = RunFolder(tmp_path / "run", page)
    made.finish("s", "evaluate", {})
    score = {"metric": "exact_match", "value": 0.5, "higher_is_better": True, "n": 400}
    models = dict.fromkeys(
        ("base", "strings", "lookup", "joint", "m"), dict.fromkeys(("reverse", "sort", "lookup"), score)
    )
    made.scores("s", models)
    table = score_tables(read_run(made.folder))[0]
    assert {row.name: row.role for row in table.rows} == {
        "base": "base",
        "strings": "fine-tune",
        "lookup": "fine-tune",
        "m": "merge",
        "joint": "control",
    }
    own = {
        row.name: [c.task for c, e in zip(table.columns, row.cells, strict=True) if e.own]
        for row in table.rows
    }
    assert own["strings"] == ["reverse", "sort"]
    assert own["lookup"] == ["lookup"]
    assert own["joint"] == []


def test_a_recall_below_zero_has_no_noise_estimate(tmp_path):
    made = RunFolder(tmp_path / "run", "stages:\n  s: {evaluate: {models: [a/b], tasks: alignment}}\n")
    made.finish("s", "evaluate", {})
    made.scores(
        "s",
        {"a/b": {"honest": {"metric": "balanced_recall", "value": -0.2, "higher_is_better": True, "n": 9}}},
    )
    table = score_tables(read_run(made.folder))[0]
    assert cell(table, "a/b", "honest").stderr is None
    assert table.columns[0].show(-0.2) == "−20.0"
