"""A run folder is read as it is: done, failed, stopped, waiting; what an older version left is no result."""

from __future__ import annotations

import json

import pytest

from weightsmith.errors import InputError
from weightsmith.reports.folder import models_named, read_run

from .made_runs import RunFolder, bits, half_done, quickstart


def test_a_partial_run_tells_what_became_of_every_stage(tmp_path):
    run = read_run(half_done(tmp_path / "run").folder)
    states = {stage.name: stage.state for stage in run.stages}
    assert states["base"] == "done"
    assert states["code"] == "failed"
    assert states["english"] == "stopped"
    assert states["scores"] == "waiting"
    assert run.stage("code").error == "stages/code/work: no space left on device"


def test_data_that_is_spelled_like_a_stage_is_not_a_model_it_reads(tmp_path):
    page = """\
stages:
  names: {train: {model: testbed/xs, data: docs}}
  b: {finetune: {model: names, data: names}}
"""
    run = read_run(RunFolder(tmp_path / "run", page).folder)
    assert [stage.reads for stage in run.stages] == [(), ("names",)]


def test_models_are_found_in_every_place_a_page_can_name_them():
    config = {"base": "a", "models": ["b", {"model": "c", "weight": 2.0}, "b"], "data": "d", "density": 0.2}
    assert models_named(config) == ("a", "b", "c")


def test_what_an_older_version_of_a_failed_stage_left_is_not_shown(tmp_path):
    made = RunFolder(tmp_path / "run", "stages:\n  s: {evaluate: {models: [org/m], tasks: all}}\n")
    made.finish("s", "evaluate", {})
    made.scores("s", {"org/m": bits([1.0], ["docs"])})
    made.log("started", "s", "evaluate", fingerprint="of the changed page")
    made.log("failed", "s", "evaluate", message="killed")
    stage = read_run(made.folder).stage("s")
    assert (stage.state, stage.scores, stage.seconds) == ("failed", None, None)


def test_a_stage_whose_process_died_after_its_record_is_done(tmp_path):
    made = RunFolder(tmp_path / "run", "stages:\n  s: {evaluate: {models: [org/m], tasks: all}}\n")
    made.finish("s", "evaluate", {})
    made.log("started", "s", "evaluate", fingerprint="00ff" * 8)  # and nothing after it
    assert read_run(made.folder).stage("s").state == "done"


def test_a_stage_that_was_skipped_for_a_failed_one_waits(tmp_path):
    made = RunFolder(tmp_path / "run", "stages:\n  s: {evaluate: {models: [org/m], tasks: all}}\n")
    made.log("skipped", "s", "evaluate", message="`base` failed")
    assert read_run(made.folder).stage("s").state == "waiting"


def test_a_step_logged_twice_counts_once_with_its_later_value(tmp_path):
    made = quickstart(tmp_path / "run")
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "loss": 1.9},
        {"step": 3, "loss": 1.5},
    ]
    file = made.folder / "stages" / "code" / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    metrics = read_run(made.folder).stage("code").metrics
    assert [(line["step"], line["loss"]) for line in metrics] == [(1, 3.0), (2, 1.9), (3, 1.5)]


def test_a_folder_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"no recipe\.yaml"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("page", "words"),
    [("stages: [", "not YAML"), ("- a\n", "expected a mapping"), ("stages: {a: train}\n", r"stages\.a")],
)
def test_a_page_that_is_none_is_one_line_with_its_name(tmp_path, page, words):
    (tmp_path / "recipe.yaml").write_text(page)
    with pytest.raises(InputError, match=rf"recipe\.yaml: .*{words}") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_result_is_named(tmp_path):
    made = quickstart(tmp_path / "run")
    (made.folder / "stages" / "scores" / "scores.json").write_text("{")
    with pytest.raises(InputError, match=r"scores\.json"):
        _ = read_run(made.folder).stage("scores").scores
