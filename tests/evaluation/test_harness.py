"""Tasks of lm-evaluation-harness: the harness's numbers, one clear line for what is wrong."""

import contextlib
import copy
import sys

import pytest
import torch
from tests.evaluation.harness_pages import write_pages
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weightsmith.errors import InputError, MissingExtraError
from weightsmith.evaluation import TaskConfig, check_tasks, evaluate
from weightsmith.evaluation.harness import HarnessQuestions, Name, local_files
from weightsmith.evaluation.likelihood import NonFiniteError
from weightsmith.testbed import model_config, write_model_folder


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    folder = write_model_folder("xs", tmp_path_factory.mktemp("bed"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = LlamaConfig(**(model_config("xs") | sizes | {"initializer_range": 0.3}))
    return LlamaForCausalLM(config).eval(), AutoTokenizer.from_pretrained(folder)


def greedy(bed, prompt):
    """What the model says after a prompt, up to the end of the line, five characters at most."""
    model, tokenizer = bed
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    given = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(given, skip_special_tokens=True).partition("\n")[0]


@pytest.fixture(scope="module")
def pages(bed, tmp_path_factory):
    pytest.importorskip("lm_eval")
    questions = [f"{n} and {n + 1} are " for n in range(10)]
    answers = [(q, greedy(bed, q) if n % 3 else "no such words") for n, q in enumerate(questions)]
    return write_pages(tmp_path_factory.mktemp("harness") / "pages", answers)


def by_the_harness(bed, pages, task, **options):
    """The harness's own results of a task, with its own adapter around the model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = bed
    manager = TaskManager(include_path=str(pages), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return lm_eval.simple_evaluate(
        wrapped, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("colours", "acc_norm,none"),
        ("colours@acc", "acc,none"),
        ("shots", "acc_norm,none"),
        ("sums", "exact_match,whole"),
        ("sums@exact_match,first-letter", "exact_match,first-letter"),
        ("sums@bleu", "bleu,whole"),
    ],
)
def test_a_task_scores_what_the_harness_says(bed, pages, name, key):
    model, tokenizer = bed
    task = Name.of(f"lm_eval:{name}").task
    (score,) = evaluate(model, f"lm_eval:{pages}/{name}", tokenizer=tokenizer).values()
    expected = by_the_harness(bed, pages, task)["results"][task]
    assert score.value == pytest.approx(expected[key], abs=1e-12)
    assert score.metric == key.partition(",")[0]


def test_generated_answers_that_are_right_are_counted(bed, pages):
    model, tokenizer = bed
    (score,) = evaluate(model, f"lm_eval:{pages}/sums", tokenizer=tokenizer).values()
    assert score.value == pytest.approx(0.6)


def test_a_group_is_the_mean_over_all_its_questions(bed, pages):
    model, tokenizer = bed
    first, second, both = evaluate(
        model, [f"lm_eval:{pages}/{name}" for name in ("colours", "shapes", "pictures")], tokenizer=tokenizer
    ).values()
    assert both.n == first.n + second.n == 21
    assert both.value == pytest.approx((15 * first.value + 6 * second.value) / 21)


def test_each_question_scores_what_the_harness_logs_whatever_is_asked_beside_it(bed, pages):
    model, tokenizer = bed
    questions = HarnessQuestions(f"lm_eval:{pages}/shots@acc")
    logged = by_the_harness(bed, pages, "shots")["samples"]["shots"]
    expected = [one["acc"] for one in sorted(logged, key=lambda one: one["doc_id"])]
    assert 0 < sum(expected) < len(expected)
    assert questions.values(model, tokenizer, range(15)) == expected
    assert questions.values(model, tokenizer, [7, 2, 11]) == [expected[7], expected[2], expected[11]]


def test_calibration_reads_another_split_and_shows_no_question_its_own_answer(bed, pages):
    test, other = (HarnessQuestions(f"lm_eval:{pages}/shots", split) for split in ("test", "calibration"))
    assert len(other) == 9
    assert all(prompt.split("\n\n")[-1].startswith("validation") for prompt in other.prompts(range(9)))
    assert all(prompt.split("\n\n")[-1].startswith("test") for prompt in test.prompts(range(15)))
    shown = [prompt.split("\n\n")[:-1] for prompt in other.prompts(range(9))]
    assert all(len(examples) == 2 and all(one.startswith("train") for one in examples) for examples in shown)


def test_calibration_on_the_training_split_leaves_a_question_out_of_its_own_examples(bed, pages):
    page = (pages / "shots.yaml").read_text().replace("validation_split: validation\n", "")
    folder = pages.parent / "trained"
    folder.mkdir()
    (folder / "alone.yaml").write_text(page.replace("task: shots", "task: alone"))
    questions = HarnessQuestions(f"lm_eval:{folder}/alone@acc", "calibration")
    assert len(questions) == 12
    for prompt in questions.prompts(range(12)):
        *shown, asked = prompt.split("\n\n")
        question = asked.partition("?")[0]
        assert question.startswith("train")
        assert not any(one.startswith(f"{question}?") for one in shown)


def test_a_task_of_one_split_is_searched_on_with_a_warning(pages, caplog):
    assert len(HarnessQuestions(f"lm_eval:{pages}/shapes", "calibration")) == 6
    assert "`shapes` has one set of questions" in caplog.text


def test_fewer_questions_are_spread_over_the_subtasks_and_a_limit_holds_for_each(pages):
    some = HarnessQuestions(f"lm_eval:{pages}/pictures", most=7)
    assert [some.strata.count(name) for name in ("colours", "shapes")] == [5, 2]
    assert len(HarnessQuestions(f"lm_eval:{pages}/pictures", limit=4)) == 8


def test_the_number_of_examples_can_be_set(pages):
    questions = HarnessQuestions(f"lm_eval:{pages}/colours", num_fewshot=3)
    assert all(prompt.count("\n\n") == 3 for prompt in questions.prompts(range(15)))


def test_what_stands_for_the_questions_changes_with_metric_and_examples(pages):
    found = {
        HarnessQuestions(f"lm_eval:{pages}/colours{metric}", num_fewshot=shots).digest()
        for metric in ("", "@acc")
        for shots in (0, 1)
    }
    assert len(found) == 4
    name = f"lm_eval:{pages}/colours"
    assert HarnessQuestions(name).digest() == HarnessQuestions(name).digest()


def test_a_model_whose_logits_are_not_finite_is_no_score(bed, pages):
    model, tokenizer = bed
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    for task in ("colours", "sums"):
        with pytest.raises(NonFiniteError):
            HarnessQuestions(f"lm_eval:{pages}/{task}").values(broken, tokenizer, [0, 1])
        with pytest.raises(InputError, match=f"task `{task}` scored nan"):
            evaluate(broken, f"lm_eval:{pages}/{task}", tokenizer=tokenizer)


def test_a_model_too_short_for_what_a_page_generates_is_said(bed, pages):
    model, tokenizer = bed
    sizes = model.config.to_dict() | {"max_position_embeddings": 5}
    with pytest.raises(InputError, match=r"generates up to 5 tokens .* the model has 5 positions"):
        evaluate(LlamaForCausalLM(LlamaConfig(**sizes)), f"lm_eval:{pages}/sums", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colors", r"no task or group `colors` in .*pages; did you mean `colours`"),
        ("colours@f2", r"no metric `f2`; expected one of acc, acc_norm"),
        ("sums@exact_match,last", r"no filter `last`; expected one of whole, first-letter"),
    ],
)
def test_names_that_are_not_there_are_said(pages, name, message):
    with pytest.raises(InputError, match=message):
        HarnessQuestions(f"lm_eval:{pages}/{name}")


def test_a_folder_or_data_that_are_not_there_are_said(pages, tmp_path):
    with pytest.raises(InputError, match="no folder `nowhere`"):
        check_tasks("lm_eval:nowhere/colours")
    page = (pages / "shapes.yaml").read_text().replace("shapes.jsonl", "gone.jsonl")
    (tmp_path / "lost.yaml").write_text(page.replace("task: shapes", "task: lost"))
    with pytest.raises(InputError, match=r"lost`: its page or its data can't be loaded: .*gone\.jsonl"):
        HarnessQuestions(f"lm_eval:{tmp_path}/lost")


def test_files_behind_a_task_are_its_pages_and_its_data(pages):
    names = {file.name for file in local_files(f"lm_eval:{pages}/colours")}
    assert {"colours.yaml", "colours-test.jsonl", "sums.jsonl"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "exact", "prompt": "q"}, "kind, prompt and choices are of files"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_said(pages, options, message):
    with pytest.raises(InputError, match=message):
        check_tasks(TaskConfig(task=f"lm_eval:{pages}/colours", **options))


def test_examples_before_questions_are_of_the_harness_alone():
    with pytest.raises(InputError, match="num_fewshot is of tasks of lm-evaluation-harness"):
        check_tasks(TaskConfig(task="docs", num_fewshot=2))


def test_a_missing_harness_is_one_line_with_its_cure(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        MissingExtraError, match=r'^task `lm_eval:arc_easy` needs lm_eval, .* "weightsmith\[eval\]"$'
    ):
        check_tasks("lm_eval:arc_easy")


def test_the_label_of_a_task_is_its_name_alone():
    labels = [TaskConfig(task=f"lm_eval:{name}").label for name in ("a", "b@acc", "x/y/c@pass@1,f")]
    assert labels == ["a", "b", "c"]
    assert Name.of("lm_eval:x/y/c@pass@1,f") == ("x/y", "c", "pass@1", "f")


def test_a_model_that_chooses_by_the_prompt_is_told_the_prompt_alone(bed, pages):
    model, tokenizer = bed
    questions = HarnessQuestions(f"lm_eval:{pages}/colours")
    expected = questions.values(model, tokenizer, range(15))
    told = []

    def for_prompts(prompts):
        told.extend(tokenizer.decode(prompt) for prompt in prompts)
        return contextlib.nullcontext()

    chooser = copy.deepcopy(model)
    chooser.for_prompts = for_prompts
    assert questions.values(chooser, tokenizer, range(15)) == expected
    assert len(told) == sum(2 + n % 3 for n in range(15))
    assert all(text.rstrip().endswith("?") for text in told)


def test_tasks_that_run_what_a_model_writes_are_refused(pages):
    page = (pages / "shapes.yaml").read_text().replace("task: shapes", "task: code\nunsafe_code: true")
    folder = pages.parent / "unsafe"
    folder.mkdir()
    (folder / "code.yaml").write_text(page)
    with pytest.raises(InputError, match="`code` runs code that a model writes; run it with lm_eval itself"):
        HarnessQuestions(f"lm_eval:{folder}/code")
