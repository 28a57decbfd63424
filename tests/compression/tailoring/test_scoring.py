"""Calibration tasks: scores per example that agree with the evaluation, in an order that is fair to
subtasks."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weightsmith.compression.tailoring.scoring import (
    Example,
    FunctionTask,
    NonFiniteError,
    TokenTask,
    checked,
    example_order,
    scored,
)
from weightsmith.compression.tailoring.tasks import _Whole, calibration_tasks
from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig, evaluate
from weightsmith.testbed import model_config, write_model_folder

from .made import gpt2, llama


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    folder = write_model_folder("xs", tmp_path_factory.mktemp("bed"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**(model_config("xs") | sizes))).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def one(bed, task, **options):
    model, tokenizer = bed
    (found,) = calibration_tasks(task, tokenizer, model.config.to_dict(), **options)
    return found.prepare(model)


def test_exact_match_of_a_skill_is_that_of_the_evaluation(bed, monkeypatch):
    model, tokenizer = bed
    task = one(bed, "maximum", examples=60)
    scores = task.score(model, range(60))
    assert set(scores) <= {0.0, 1.0}
    expected = evaluate(model, "maximum", "calibration", tokenizer=tokenizer, items=60)["maximum"]
    assert sum(scores) / 60 == pytest.approx(expected.value)


def test_text_of_the_base_itself_scores_one_and_of_a_worse_model_its_share_of_perplexity(bed):
    model, _ = bed
    task = one(bed, "docs", examples=6, length=20)
    assert task.size == 6
    assert task.score(model, range(6)) == pytest.approx([1.0] * 6)
    other = LlamaForCausalLM(model.config).eval()
    dense, own = (_nats(one_, task.examples[0]) for one_ in (model, other))
    assert task.score(other, [0])[0] == pytest.approx(min(1.0, math.exp(dense - own)), rel=1e-4)


def test_tasks_of_tokens_share_passes_and_score_what_each_scores_alone(bed):
    model, _ = bed
    names = ("sort", "count", "docs", "maximum")
    tasks = [one(bed, name, examples=12, length=20, text="retained") for name in names]
    tasks.insert(1, FunctionTask("mine", lambda model, indices: [index / 12 for index in indices], 12))
    tasks[-1] = replace(tasks[-1], batch_size=5)  # wants batches of its own
    wanted = [(task, range(place, 12, 2)) for place, task in enumerate(tasks)]
    other = LlamaForCausalLM(model.config).eval()
    passes = []
    hook = other.register_forward_hook(lambda *_: passes.append(1))
    alone = [task.score(other, indices) for task, indices in wanted]
    num_alone = len(passes)
    together = scored(other, wanted)
    hook.remove()
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(passes) - num_alone < num_alone
    assert scored(other, []) == []


def test_retained_gain_is_one_for_the_base_and_nought_for_guessing(bed):
    model, _ = bed
    better = LlamaForCausalLM(model.config).eval()
    optimizer = torch.optim.Adam(better.parameters(), 1e-2)
    task = one(bed, "docs", examples=4, length=20, text="retained")
    rows = torch.tensor(task.token_rows(range(4)))
    for _ in range(30):
        optimizer.zero_grad()
        better(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    task = task.prepare(better)
    assert task.score(better, range(4)) == pytest.approx([1.0] * 4)
    guessing = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        guessing.lm_head.weight.zero_()
    assert task.score(guessing, range(4)) == pytest.approx([0.0] * 4, abs=1e-5)


def _nats(model, example):
    tokens = torch.tensor([[*example.prompt, *example.answers[0]]])
    with torch.no_grad():
        logs = model(tokens).logits[0, :-1].log_softmax(-1)
    return -float(logs.gather(1, tokens[0, 1:, None]).mean())


def test_files_are_read_as_the_evaluation_reads_them(bed, tmp_path):
    model, tokenizer = bed
    exam, quiz, text = tmp_path / "exam.jsonl", tmp_path / "quiz.jsonl", tmp_path / "notes.txt"
    exam.write_text("".join(json.dumps({"q": f"{n}+1=", "text": str(n + 1)}) + "\n" for n in range(9)))
    rows = [{"q": f"{n}?", "options": ["yes", "no", "it depends"], "right": n % 3} for n in range(9)]
    quiz.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    exact = TaskConfig(task=str(exam), prompt="q")
    choice = TaskConfig(task=str(quiz), prompt="q", choices="options", column="right")
    for config in (exact, choice):
        task = one(bed, config)
        expected = evaluate(model, config, tokenizer=tokenizer)[config.label].value
        assert sum(task.score(model, range(9))) / 9 == pytest.approx(expected)
    assert one(bed, str(text), length=50).size == 225 // 50
    assert one(bed, exact, examples=4).size == 4


def test_examples_of_other_examples_do_not_matter(bed):
    model, _ = bed
    task = one(bed, "docs", examples=8, length=20)
    other = LlamaForCausalLM(model.config).eval()
    whole = task.score(other, range(8))
    assert task.score(other, [5, 2]) == pytest.approx([whole[5], whole[2]], abs=1e-5)


def test_logits_that_are_not_finite_are_said(bed):
    model, _ = bed
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    for name in ("maximum", "docs"):
        with pytest.raises(NonFiniteError, match=name):
            one(bed, name, examples=4, length=10).score(broken, [0, 1])


def test_every_beginning_of_the_order_is_fair_to_subtasks():
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    task = FunctionTask("t", lambda model, indices: [], 100, strata)
    order = example_order(task, 0)
    assert sorted(order) == list(range(100))
    for size in (10, 30, 70):
        counts = [sum(strata[index] == name for index in order[:size]) for name in "abc"]
        assert all(
            abs(count - share * size) <= 1 for count, share in zip(counts, (0.6, 0.3, 0.1), strict=True)
        )
    assert example_order(task, 0) == order
    assert example_order(task, 1) != order


def halved(model, tokenizer):
    return 0.5


def lower(model, tokenizer):
    from weightsmith.evaluation import Score

    return Score("loss", 0.5, False, 1)


def test_a_function_of_the_evaluation_is_one_example(bed, monkeypatch):
    import sys
    import types

    mine = types.ModuleType("mine")
    mine.halved, mine.lower = halved, lower
    monkeypatch.setitem(sys.modules, "mine", mine)
    task = one(bed, "mine:halved")
    assert (task.size, task.score(bed[0], [0])) == (1, [0.5])
    with pytest.raises(InputError, match="lower is better"):
        one(bed, "mine:lower").score(bed[0], [0])


def test_the_digest_of_a_function_is_that_of_its_text(monkeypatch, tmp_path):
    def digest(function):
        return FunctionTask("mine", function, 3).digest

    (tmp_path / "first_metric.py").write_text("def score(model, indices):\n    return [0.5] * len(indices)\n")
    (tmp_path / "other_metric.py").write_text("def score(model, indices):\n    return [0.6] * len(indices)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import first_metric  # pyrefly: ignore[missing-import]
    import other_metric  # pyrefly: ignore[missing-import]

    class Metric:
        def __call__(self, model, indices):
            return [0.5 for _ in indices]

    typed: dict = {}
    exec("def score(model, indices):\n    return [0.5]\n", typed)
    kinds = [first_metric.score, other_metric.score, Metric(), typed["score"]]
    assert len({digest(kind) for kind in kinds}) == 4
    assert digest(Metric()) == digest(Metric())  # not that of an object's place in memory
    assert digest(partial(first_metric.score, indices=[1])) == digest(first_metric.score)
    named = [FunctionTask("mine", _Whole(f"{name}_metric:score", None), 1) for name in ("first", "other")]
    assert [task.digest for task in named] == [digest(kind) for kind in kinds[:2]]


def test_a_row_that_is_longer_than_the_positions_of_the_model_is_named(tmp_path):
    rows = [("a short one", "yes"), ("w" * 66, "no")]
    text = "".join(json.dumps({"q": q, "text": a}) + "\n" for q, a in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(write_model_folder("xs", tmp_path / "bed"))
    config = TaskConfig(task=str(tmp_path / "rows.jsonl"), prompt="q")
    (task,) = calibration_tasks(config, tokenizer, {})
    (prompt, (answer,), *_) = task.examples[1]
    expected = rf"task `rows`: row 2 has {len(prompt) + len(answer) - 1} tokens, the model has 64 positions"
    with pytest.raises(InputError, match=expected):
        task.prepare(gpt2())
    assert task.prepare(llama()) == task  # 64 in its config, and rotary
    fits = replace(task, examples=(Example((1,) * 60, ((2,) * 5,)),))
    assert fits.prepare(gpt2()) == fits


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("sauce", "no task `sauce`"),
        ("honest", "no score per example"),
        ("niah", "no score per example yet"),
        ([], "nothing to score"),
        ([TokenTask("t", "exact", ())], "`t`: has no examples"),
    ],
)
def test_tasks_that_cannot_be_searched_on_are_refused(bed, tasks, words):
    model, tokenizer = bed
    with pytest.raises(InputError, match=words):
        calibration_tasks(tasks, tokenizer, model.config.to_dict())


def test_two_tasks_of_one_name_and_a_missing_tokenizer_are_refused(bed):
    model, tokenizer = bed
    mine = FunctionTask("docs", lambda model, indices: [], 3)
    with pytest.raises(InputError, match="two tasks are called `docs`"):
        calibration_tasks(["docs", mine], tokenizer, model.config.to_dict(), examples=2)
    with pytest.raises(InputError, match="`docs` needs the base's tokenizer"):
        calibration_tasks("docs", None, model.config.to_dict())


def test_scores_are_checked():
    task = FunctionTask("t", lambda model, indices: [], 3)
    assert checked(task, (0, 1, 0.5), 3) == [0.0, 1.0, 0.5]
    with pytest.raises(InputError, match=r"scored 1\.1"):
        checked(task, [1.1], 1)
