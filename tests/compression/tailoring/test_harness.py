"""Tasks of lm-evaluation-harness as what a search is scored on."""

import json
import math
import pickle

import pytest
import torch
from tests.evaluation.harness_pages import write_pages
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring.scoring import NonFiniteError, equal_rows, example_order
from weightsmith.compression.tailoring.tasks import calibration_tasks
from weightsmith.errors import InputError
from weightsmith.evaluation import evaluate
from weightsmith.testbed import model_config, write_model_folder

from .made import near


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = write_model_folder("xs", tmp_path_factory.mktemp("bed"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    config = LlamaConfig(**(model_config("xs") | sizes | {"initializer_range": 0.3}))
    return LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pages(bed, tmp_path_factory):
    sums = [(f"{n} is ", "x") for n in range(8)]
    return write_pages(tmp_path_factory.mktemp("harness") / "pages", sums)


def one(bed, task, **options):
    model, tokenizer = bed
    (found,) = calibration_tasks(task, tokenizer, model.config.to_dict(), **options)
    return found.prepare(model)


def test_scores_are_those_of_the_evaluation_on_calibration(bed, pages):
    model, tokenizer = bed
    for name, size in (("colours@acc", 9), ("pictures", 15), ("sums", 8)):
        task = one(bed, f"lm_eval:{pages}/{name}")
        (expected,) = evaluate(model, f"lm_eval:{pages}/{name}", "calibration", tokenizer=tokenizer).values()
        assert task.size == size
        assert sum(task.score(model, range(size))) / size == pytest.approx(expected.value)


def test_questions_of_a_group_are_fair_to_its_subtasks_at_every_budget(bed, pages):
    task = one(bed, f"lm_eval:{pages}/pictures")
    order = example_order(task, 0)
    for size in (5, 10):
        counts = [sum(task.strata[index] == name for index in order[:size]) for name in ("colours", "shapes")]
        assert counts == [3 * size // 5, 2 * size // 5]
    assert one(bed, f"lm_eval:{pages}/pictures", examples=5).size == 5


def test_a_task_in_another_process_asks_the_same(bed, pages):
    model, _ = bed
    task = one(bed, f"lm_eval:{pages}/shots", examples=6)
    sent = pickle.loads(pickle.dumps(task))
    assert sent.questions.digest() == task.digest
    assert sent.score(model, [4, 1]) == task.score(model, [4, 1])


def test_prompts_serve_to_find_layers_of_little_influence(bed, pages):
    batches = equal_rows(one(bed, f"lm_eval:{pages}/colours").token_rows([0, 3, 6]))
    assert sum(len(batch) for batch in batches) == 3
    with torch.inference_mode():
        assert all(math.isfinite(float(bed[0](batch).logits.sum())) for batch in batches)


def test_a_metric_without_a_score_per_question_is_refused(bed, pages):
    with pytest.raises(InputError, match="metric bleu gives no score per question"):
        one(bed, f"lm_eval:{pages}/sums@bleu")


def test_logits_that_are_not_finite_are_said(bed, pages):
    broken = near(bed[0], 1)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="colours"):
        one(bed, f"lm_eval:{pages}/colours").score(broken, [0, 1])


def test_a_search_on_the_harness_scores_questions_once_and_its_log_knows_the_metric(bed, pages, tmp_path):
    model, tokenizer = bed
    tasks = [f"lm_eval:{pages}/colours@acc", f"lm_eval:{pages}/sums"]
    options = dict(tokenizer=tokenizer, keep_layers=2, n_trials=8, min_budget=3, max_budget=9, work=tmp_path)
    search = TailorSearch(model, [near(model, 1)], tasks=tasks, **options)
    plan = search.run()
    assert set(plan.costs) == {"colours", "sums"}
    best = next(trial for trial in search.trials if trial.id == plan.settings["trial"])
    made, task = plan.build(), one(bed, tasks[0])
    whole = task.score(made, example_order(task, 0)[: best.budget])
    assert best.costs["colours"] == pytest.approx(1 - sum(whole) / len(whole))
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()[1:]]
    seen = {}
    for line in lines:
        key = json.dumps(line["configuration"])
        assert line["status"] == "ok", line["error"]
        seen[key] = seen.get(key, 0) + len(line["values"].get("colours", ()))
    assert max(seen.values()) == 9
    with pytest.raises(InputError, match="was made with tasks"):
        TailorSearch(
            model, [near(model, 1)], tasks=[f"lm_eval:{pages}/colours@acc_norm", tasks[1]], **options
        ).run()


def test_common_first_layers_are_run_once(bed, pages):
    from weightsmith.compression.tailoring.pool import LayerPool
    from weightsmith.compression.tailoring.prefix import PrefixCache
    from weightsmith.compression.tailoring.space import Configuration

    pool, task = LayerPool(bed[0], []), one(bed, f"lm_eval:{pages}/colours")
    cache, configuration = PrefixCache(1 << 20), Configuration.of(3)
    found = []
    for _ in range(2):
        model = pool.assemble(configuration)
        with cache.reading(model, pool, configuration):
            found.append(task.score(model, range(9)))
    assert cache.num_skipped > 0
    assert found[0] == found[1] == task.score(bed[0], range(9))
