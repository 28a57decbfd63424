"""The stage `tailor`: what a page may say, a run of it, and one that was killed."""

import json
import sys

import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.compression import TailorPlan
from weightsmith.compression.tailoring import search, workers
from weightsmith.errors import PageError, WeightsmithError
from weightsmith.evaluation import load_model
from weightsmith.recipes import Inline, load_page, plan_run, run_recipe
from weightsmith.runs.seeds import derive

from .conftest import page_of

PAGE = """\
name: tiny
stages:
  base:
    train: &short {model: FOLDER/model, data: FOLDER/a.txt, sequence_length: 32, batch_size: 2, steps: 4}
  one: {finetune: {<<: *short, model: base}}
  two: {finetune: {<<: *short, model: base, seed: 2}}
  smaller:
    tailor:
      base: base
      candidates: [one, two]
      keep_layers: 2
      tasks: [FOLDER/a.txt]
      trials: 12
      min_budget: 2
      max_budget: 4
  scores: {evaluate: {models: [base, smaller], tasks: [FOLDER/a.txt]}}
"""


@pytest.fixture
def page(tmp_path):
    return page_of(tmp_path, PAGE, layers=3)


def test_the_output_is_a_plain_checkpoint_with_fewer_layers(page, tmp_path):
    planned = {stage.stage: stage.prediction for stage in plan_run(page(), root=tmp_path / "runs").stages}
    result = run_recipe(page(), root=tmp_path / "runs", executor=Inline())
    assert {stage.status for stage in result.stages} == {"finished"}
    folder = tmp_path / "runs" / "tiny" / "stages" / "smaller"
    with Checkpoint.open(folder / "checkpoint") as made:
        assert made.config["num_hidden_layers"] == 2
        assert not any(".layers.2." in name for name in made.tensors)
    model, _ = load_model(folder / "checkpoint", device="cpu")
    plan = TailorPlan.load(folder / "plan.json")
    assert len(plan.configuration.kept) == model.config.num_hidden_layers
    trials = json.loads((folder / "trials.json").read_text())
    assert [trial["id"] for trial in trials] == list(range(12))
    size = sum(file.stat().st_size for file in (folder / "checkpoint").rglob("*") if file.is_file())
    assert planned["smaller"].disk_bytes == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("trials: 12", "n_trials: 12", "stages.smaller.n_trials: no such key; did you mean `trials`"),
        ("trials: 12", "trials: 0", "stages.smaller.trials: .*at least 1"),
        ("keep_layers: 2", "sparsty: 0.2", "stages.smaller.sparsty: no such key; did you mean `sparsity`"),
        ("keep_layers: 2", "seed: 1", "stages.smaller.tailor: expected one of `sparsity` and `keep_layers`"),
        (
            "tasks: [FOLDER/a.txt]\n      trials",
            "tasks: [sorce]\n      trials",
            "stages.smaller.tasks.*source",
        ),
    ],
)
def test_a_wrong_page_is_told_by_line_and_key(page, old, new, said):
    with pytest.raises(PageError, match=said):
        load_page(page((old, new)))


@pytest.mark.parametrize("ray", ["", "ray: local"])
def test_ray_and_workers_of_the_page_are_those_of_the_search(page, tmp_path, monkeypatch, ray):
    given = []

    def here(evaluator, count, address):
        given.append((count, address))
        return workers.workers(evaluator)

    monkeypatch.setattr(search, "workers", here)
    changed = page(("trials: 12", f"trials: 2\n      workers: 3\n      {ray}"))
    result = run_recipe(changed, root=tmp_path / "runs", executor=Inline())
    assert {stage.status for stage in result.stages} == {"finished"}
    assert given == [(3, "local" if ray else None)]


def test_a_page_that_asks_for_ray_says_what_to_install(page, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    changed = page(("trials: 12", "trials: 2\n      ray: auto"))
    with pytest.raises(WeightsmithError, match=r'.*ray.*pip install "weightsmith\[ray\]"') as raised:
        run_recipe(changed, root=tmp_path / "runs", executor=Inline())
    assert "\n" not in str(raised.value)


def test_the_seed_of_the_page_counts_from_nought_on(page, tmp_path):
    def seed(*changes):
        file = page(("trials: 12", "trials: 2"), *changes)
        run_recipe(file, root=tmp_path / "runs", executor=Inline())
        return TailorPlan.load(tmp_path / "runs" / "tiny" / "stages" / "smaller" / "plan.json").settings[
            "seed"
        ]

    assert seed(("keep_layers: 2", "keep_layers: 2\n      seed: 0")) == 0
    assert seed(("keep_layers: 2", "keep_layers: 2\n      seed: 7")) == 7
    assert seed() == derive(0, "smaller")


def test_tasks_of_lm_evaluation_harness_are_read_again_when_their_data_change(page, tmp_path):
    pytest.importorskip("lm_eval")
    from tests.evaluation.harness_pages import write_pages

    pages = write_pages(tmp_path / "pages")
    text = f'tasks: ["lm_eval:{pages}/colours@acc", {{task: "lm_eval:{pages}/shapes", num_fewshot: 1}}]'
    made = page(("tasks: [FOLDER/a.txt]", text))
    done = [run_recipe(made, root=tmp_path / "runs", executor=Inline()) for _ in range(2)]
    assert {stage.status for stage in done[1].stages} == {"reused"}
    scores = json.loads((tmp_path / "runs" / "tiny" / "stages" / "scores" / "scores.json").read_text())
    assert scores["tasks"] == ["colours", "shapes"]
    assert scores["models"]["smaller"]["colours"]["n"] == 15
    data = pages / "shapes.jsonl"
    data.write_text(data.read_text().replace("a square", "a cube"))
    again = run_recipe(made, root=tmp_path / "runs", executor=Inline())
    assert {stage.stage: stage.status for stage in again.stages}["scores"] == "finished"
