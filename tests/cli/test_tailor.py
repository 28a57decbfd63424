"""`weightsmith tailor`."""

import json

import pytest
from tests.recipes.conftest import small_model
from typer.testing import CliRunner

from weightsmith.checkpoints import Checkpoint
from weightsmith.cli.main import app
from weightsmith.compression import TailorPlan
from weightsmith.errors import CheckpointError, InputError


@pytest.fixture
def models(tmp_path):
    small_model(tmp_path)
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tmp_path / "model", num_hidden_layers=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["tailor", *map(str, words)])


def test_a_search_writes_a_model_its_log_and_mergekits_page_and_its_plan_builds_the_same(models):
    search = ["--task", models / "a.txt", "--keep-layers", "2", "--trials", "9"]
    budgets = ["--option", "min_budget=2", "--option", "max_budget=4"]
    made = run(
        *(models / "base", models / "out", "--candidate", models / "one", *search, *budgets),
        *("--work", models / "work", "--mergekit", models / "page.yml", "--json"),
    )
    assert made.exit_code == 0, made.exception
    record = json.loads(made.stdout)
    assert len(record["dropped"]) == 1
    assert "merge_method: task_arithmetic" in (models / "page.yml").read_text()
    assert len((models / "work" / "trials.jsonl").read_text().splitlines()) >= 9
    plan = models / "work" / "plan.json"
    assert TailorPlan.load(plan).configuration.to_json() == record["configuration"]
    again = run(models / "base", models / "again", "--candidate", models / "one", "--plan", plan)
    assert again.exit_code == 0, again.exception
    with Checkpoint.open(models / "out") as one, Checkpoint.open(models / "again") as other:
        assert one.config["num_hidden_layers"] == 2
        assert one.fingerprint(full=True) == other.fingerprint(full=True)
    taken = run(models / "base", models / "out", *search)
    assert isinstance(taken.exception, CheckpointError)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sparsity", "0.5"], "tailor: give what to score combinations on: --task"),
        (["--task", "FOLDER/a.txt"], "expected one of `sparsity` and `keep_layers`"),
        (["--task", "FOLDER/a.txt", "--sparsity", "0.5", "--option", "eta=1"], "eta: 1, expected at least 2"),
        (["--task", "FOLDER/a.txt", "--sparsity", "0.5", "--option", "etta=3"], "etta: no such key.*`eta`"),
        (["--plan", "FOLDER/a.txt"], "a.txt"),
        (["--task", "FOLDER/a.txt", "--option", "ray=local"], "--option ray: expected an option of the"),
        (["--plan", "FOLDER/a.txt", "--task", "docs"], "--task is for a search, and --plan needs none"),
        (["--task", "FOLDER/a.txt", "--option", "workers=2"], "--option workers: expected an option of the"),
        (["--task", "FOLDER/a.txt", "--sparsity", "0.5", "--dtype", "bf17"], "bf17"),
    ],
)
def test_wrong_words_are_one_line(models, words, said):
    words = [word.replace("FOLDER", str(models)) for word in words]
    made = run(models / "base", models / "out", *words)
    assert isinstance(made.exception, InputError)
    with pytest.raises(InputError, match=said):
        raise made.exception
    assert not (models / "out").exists()


def test_tasks_of_lm_evaluation_harness_are_taken_by_name(models):
    pytest.importorskip("lm_eval")
    from tests.evaluation.harness_pages import write_pages

    pages = write_pages(models / "pages")
    task = ["--task", f"lm_eval:{pages}/colours@acc", "--keep-layers", "2", "--trials", "6"]
    budgets = ["--option", "min_budget=3", "--option", "max_budget=9"]
    made = run(models / "base", models / "out", "--candidate", models / "one", *task, *budgets, "--json")
    assert made.exit_code == 0, made.exception
    assert list(json.loads(made.stdout)["costs"]) == ["colours"]
    words = ["evaluate", str(models / "out"), "--task", f"lm_eval:{pages}/pictures", "--json"]
    scored = CliRunner().invoke(app, words)
    assert scored.exit_code == 0, scored.exception
    (scores,) = json.loads(scored.stdout)["models"].values()
    assert scores["pictures"]["metric"] == "acc_norm"
    assert scores["pictures"]["n"] == 21
