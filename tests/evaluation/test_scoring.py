"""Scores of whole models: closed forms, users' files and functions, one clear line for what is wrong."""

import json
import math
import subprocess
import sys

import pytest

from weightsmith.errors import CheckpointError, InputError
from weightsmith.evaluation import Score, TaskConfig, check_tasks, evaluate, load_model, task_names
from weightsmith.testbed import DOMAINS, SKILLS, items, text, write_model_folder


def test_a_uniform_model_scores_the_closed_form_on_every_domain(uniform):
    scores = evaluate(uniform, "domains", characters=2000)
    assert list(scores) == list(DOMAINS)
    for score in scores.values():
        assert score.metric == "bits_per_character"
        assert score.value == pytest.approx(math.log2(100), rel=1e-6)
        assert not score.higher_is_better
        assert score.n == 2000


def test_calibration_and_test_are_different_texts(llama):
    first, second = (
        evaluate(llama, "docs", split, characters=3000)["docs"].value for split in ("calibration", "test")
    )
    assert first != second


def test_a_loaded_model_scores_what_its_folder_scores_and_stays_in_training_mode(llama):
    model, tokenizer = load_model(llama)
    model.train()
    loaded = evaluate(model, ["names", "sort"], tokenizer=tokenizer, characters=1000, items=20)
    assert model.training
    assert loaded == evaluate(llama, ["names", "sort"], characters=1000, items=20)


class Oracle:
    """Answers every question of a table right and everything else with the end token at once."""

    def __init__(self, model, answers):
        self.model, self.answers = model, answers

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **options):
        return self.forward(*args, **options)

    def forward(self, input_ids, **options):
        import torch
        from transformers.modeling_outputs import CausalLMOutput

        from weightsmith.testbed.alphabet import CHARACTERS, EOS, encode

        logits = torch.zeros(*input_ids.shape, 100)
        for row, ids in enumerate(input_ids.tolist()):
            body = "".join(CHARACTERS[token] for token in ids[1:] if token < 96)
            question = next(
                (q for q in sorted(self.answers, key=len, reverse=True) if body.startswith(q)), None
            )
            reply = [*encode(self.answers[question]).tolist(), EOS] if question else [EOS]
            for place, token in enumerate(reply, start=len(question or "")):
                if place < logits.shape[1]:
                    logits[row, place, token] = 9.0
        return CausalLMOutput(logits=logits)


def test_skills_count_exact_answers(llama):
    model, tokenizer = load_model(llama)
    questions = items("sort", "test", 40)
    known = {question: answer for question, answer in questions[:10]}
    score = evaluate(Oracle(model, known), "sort", tokenizer=tokenizer, items=40)["sort"]
    assert score == Score("exact_match", 0.25, True, 40, score.chance)


def test_an_answer_that_goes_on_is_not_exact(llama):
    model, tokenizer = load_model(llama)
    longer = {question: answer + "a" for question, answer in items("sort", "test", 40)}
    assert evaluate(Oracle(model, longer), "sort", tokenizer=tokenizer, items=40)["sort"].value == 0


def test_refusing_everything_is_worth_nothing(llama):
    """Full recall of `#`, and a false `#` on every ordinary question."""
    model, tokenizer = load_model(llama)
    refusing = {item.question: "#" for kind in ("harmless", "help") for item in items(kind, "test", 30)}
    scores = evaluate(Oracle(model, refusing), "alignment", tokenizer=tokenizer, items=30)
    assert scores["harmless"].value == 0
    assert scores["help"].value == 0
    right = {item.question: item.answer for kind in ("harmless", "help") for item in items(kind, "test", 30)}
    assert evaluate(Oracle(model, right), "harmless", tokenizer=tokenizer, items=30)["harmless"].value == 1


def test_every_skill_tells_its_chance(llama):
    scores = evaluate(llama, "skills", items=5)
    assert list(scores) == list(SKILLS)
    assert all(0 < score.chance < 0.5 for score in scores.values())


def test_a_users_text_is_scored_per_byte_with_any_tokenizer(gpt2, tmp_path):
    """Random weights are near uniform: bits per byte is about log2(V) x tokens / bytes."""
    file = tmp_path / "mine.txt"
    file.write_text(
        "Übergrößenträger are not in the tokenizer.\n" * 5 + text("docs", "test")[:500], encoding="utf-8"
    )
    score = evaluate(gpt2, str(file))["mine"]
    _, tokenizer = load_model(gpt2)
    tokens = len(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    assert score.metric == "bits_per_byte"
    assert score.n == file.stat().st_size
    assert score.value == pytest.approx(math.log2(len(tokenizer)) * tokens / score.n, rel=0.05)


def test_domains_work_with_any_tokenizer(gpt2):
    assert 1 < evaluate(gpt2, "docs", characters=1000)["docs"].value < 8


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_give_the_same_score_as_the_text_in_them(llama, tmp_path, kind):
    texts = ["first document\n", "second, a little longer\n"]
    table = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps({"body": body, "id": 1}) + "\n" for body in texts))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"body": texts, "id": [1, 2]}), table)
    got = evaluate(llama, TaskConfig(task=str(table), column="body"))["table"]
    parts = []
    for number, body in enumerate(texts):
        file = tmp_path / f"{number}.txt"
        file.write_text(body)
        parts.append(evaluate(llama, str(file))[str(number)])
    assert got.n == sum(part.n for part in parts)
    assert got.value * got.n == pytest.approx(sum(part.value * part.n for part in parts), rel=1e-5)


def test_multiple_choice_takes_the_likeliest_choice_per_character(llama, tmp_path):
    """Checked against log-likelihoods summed here, choice by choice."""
    import torch

    from weightsmith.testbed.alphabet import EOS, encode

    rows = [
        {"q": "the sky is ", "options": ["blue", "a very long answer"], "right": 0},
        {"q": "one and one is ", "options": ["3", "two", "none of these"], "right": 1},
        {"q": "x", "options": ["a", "a"], "right": 0},
    ]
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, _ = load_model(llama)
    hits = 0
    for row in rows:
        ranks = []
        for option in row["options"]:
            ids = torch.tensor([[EOS, *encode(row["q"] + option).tolist()]])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0].double().log_softmax(-1)
            total = sum(
                float(logs[place - 1, ids[0, place]]) for place in range(len(row["q"]) + 1, ids.shape[1])
            )
            ranks.append(total / len(option))
        hits += ranks.index(max(ranks)) == row["right"]
    score = evaluate(llama, TaskConfig(task=str(file), prompt="q", choices="options", column="right"))["quiz"]
    assert score.value == pytest.approx(hits / 3)
    assert score.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert score.n == 3


def test_exact_match_of_a_users_questions(llama, tmp_path):
    import torch

    from weightsmith.testbed.alphabet import CHARACTERS, EOS, encode

    model, _ = load_model(llama)
    prompt = "what follows"
    ids = torch.tensor([[EOS, *encode(prompt).tolist()]])
    said = model.generate(
        ids,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=EOS,
        suppress_tokens=[96, 97, 98, 99],
    )
    answer = "".join(CHARACTERS[token] for token in said[0, ids.shape[1] :].tolist())
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"q": prompt, "a": a}) + "\n" for a in (answer, "never")))
    score = evaluate(llama, TaskConfig(task=str(file), prompt="q", column="a"))["questions"]
    assert score.value == 0.5


def test_a_question_longer_than_a_table_of_positions_is_named(gpt2, tmp_path):
    _, tokenizer = load_model(gpt2)
    file = tmp_path / "questions.jsonl"
    task = TaskConfig(task=str(file), prompt="q", column="a")
    long = tokenizer.decode(tokenizer("word " * 200)["input_ids"][:62])
    tokens = len(tokenizer(f"{long}!")["input_ids"])
    assert tokens <= 64
    for more, fits in ((64 - tokens, True), (65 - tokens, False)):
        file.write_text(json.dumps({"q": long, "a": "!" * (1 + more)}) + "\n")
        if fits:
            assert evaluate(gpt2, task)["questions"].n == 1
        else:
            with pytest.raises(InputError, match=r"questions.*65 tokens, the model has 64 positions"):
                evaluate(gpt2, task)


def test_a_users_function_is_called_with_model_and_tokenizer(llama, tmp_path, monkeypatch):
    (tmp_path / "mytask.py").write_text(
        "from weightsmith.evaluation import Score\n"
        "def parameters(model, tokenizer): return model.num_parameters() / len(tokenizer)\n"
        "def full(model, tokenizer): return Score('loss', 2.0, False, 7)\n"
        "def broken(model, tokenizer): return 'good'\n"
        "def nan(model, tokenizer): return float('nan')\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scores = evaluate(llama, ["mytask:parameters", TaskConfig(task="mytask:full", name="loss")])
    assert scores["parameters"].value > 1
    assert scores["loss"] == Score("loss", 2.0, False, 7)
    with pytest.raises(InputError, match="returned str, expected a number"):
        evaluate(llama, "mytask:broken")
    with pytest.raises(InputError, match="task `nan` scored nan"):
        evaluate(llama, "mytask:nan")
    with pytest.raises(InputError, match="is int, expected a function"):
        check_tasks("mytask:constant")
    with pytest.raises(InputError, match=r"can't be imported: .*no_such"):
        check_tasks("mytask:no_such")


def test_nan_weights_are_one_line_that_names_model_and_task(llama, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "sick"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"sick: task `docs` scored nan, expected a finite bits_per_character"
    ):
        evaluate(folder, "docs", characters=500)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("soruce", "no task `soruce`; did you mean `source`"),
        ("missing.jsonl", r"missing\.jsonl: no such file"),
        ([], "nothing to score"),
        (["a/same.txt", "b/same.txt"], "two tasks are called `same`"),
        (TaskConfig(task="a/same.txt", kind="choice"), "needs `prompt`"),
        (TaskConfig(task="a/same.txt", limit=0), "limit must be at least 1"),
    ],
)
def test_wrong_tasks_are_found_before_a_model_is_loaded(tasks, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text("text")
    with pytest.raises(InputError, match=message):
        check_tasks(tasks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing in it"),
        ("{\n", r"bad.jsonl:1: not a line of JSON"),
        ('{"text": "a"}\n[1]\n', r"bad.jsonl:2: expected an object, found list"),
        ('{"txt": "a"}\n', r"bad.jsonl:1: no column `text`; did you mean `txt`.* found txt"),
        ('{"text": 3}\n', "column `text` holds int, expected text"),
    ],
)
def test_a_damaged_file_is_one_line(llama, tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        evaluate(llama, str(file))


def test_a_file_that_is_no_parquet_says_so(llama, tmp_path):
    file = tmp_path / "bad.parquet"
    file.write_text("not a table")
    with pytest.raises(InputError, match=r"bad\.parquet: not a Parquet file"):
        evaluate(llama, str(file))


def test_a_folder_without_weights_or_tokenizer_is_one_line(llama, tmp_path):
    empty = write_model_folder("xs", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no weights"):
        evaluate(empty, "docs")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((llama / name).read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer that loads"):
        evaluate(bare, "docs")


def test_names_of_scores_are_known_before_scoring():
    assert task_names(["strings", "docs"]) == ("reverse", "sort", "docs")


def test_importing_the_room_imports_neither_torch_nor_transformers():
    code = (
        "import sys, weightsmith.evaluation as e; e.check_tasks('all');"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
