"""Facts in a long context: prompts of the right length, needles in their place, closed forms, bad input."""

import json
import re

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from weightsmith.errors import InputError
from weightsmith.evaluation import (
    Question,
    TaskConfig,
    check_tasks,
    evaluate,
    load_model,
    made_questions,
    mdqa,
    niah_grid,
)
from weightsmith.evaluation.retrieval import NEEDLE, NEEDLE_QUESTION, normalised
from weightsmith.testbed.alphabet import CHARACTERS, EOS, encode

HAY = "The quick brown fox jumps over the lazy dog while it rains. "


class Reader:
    """Goes on as its context says: after `The code of x is` or `Answer:` comes what the context has for it.
    It sees the last `sight` tokens only.
    """

    def __init__(self, model, sight=10**6):
        self.model, self.sight, self.prompts = model, sight, set()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **options):
        return self.forward(*args, **options)

    def forward(self, input_ids, **options):
        logits = torch.zeros(*input_ids.shape, 100)
        for row, ids in enumerate(input_ids.tolist()):
            text = "".join(CHARACTERS[token] if token < 96 else "\0" for token in ids[1:])
            body = self.body(text)
            self.prompts.add(body)
            wanted = " " + self.answer(body[-self.sight :])
            for place, token in enumerate(encode(wanted)):
                at = len(body) + place  # the token at `at` says what comes next
                if at < len(ids):
                    logits[row, at, int(token)] = 1.0
        return CausalLMOutput(logits=logits)

    def body(self, text):
        mark = text.rfind("\nThe code of ") if "\nThe code of " in text else text.rfind("Answer:")
        return text[: text.index(" is", mark) + 3] if "\nThe code of " in text else text[: mark + 7]

    def answer(self, body):
        name = body.rpartition("of ")[2].removesuffix(" is") if body.endswith(" is") else None
        if name is None:
            asked = body.rpartition("What is ")[2].partition("?")[0]
            asked = asked[0].upper() + asked[1:]
            return body.partition(f"{asked} is ")[2].partition(".")[0]
        return body.partition(f"The code of {name} is ")[2][:5]


@pytest.fixture(scope="module")
def model(llama):
    return load_model(llama)


def test_prompts_have_the_length_asked_for_and_the_needle_at_its_depth(model):
    reader = Reader(model[0])
    cells = niah_grid(reader, model[1], HAY, [90, 120], (0.0, 0.5, 1.0), needles=4)
    assert [(cell.length, cell.place, cell.found, cell.n) for cell in cells] == [
        (length, depth, 4, 4) for length in (90, 120) for depth in (0.0, 0.5, 1.0)
    ]
    assert cells[0].to_json()["recall"] == 1.0
    starts = {}
    for prompt in reader.prompts:
        # Start token, prompt, and an answer of a blank and five digits.
        length = 1 + len(prompt) + 6
        assert length in (90, 120)
        question = prompt.rindex("\nThe code of ")
        assert question == len(prompt) - len(NEEDLE_QUESTION.format(name="bababa"))
        room = question - len(NEEDLE.format(name="bababa", code="00000"))
        starts.setdefault(length, set()).add(prompt.index(" The code of ") / room)
    assert all({round(depth, 1) for depth in found} == {0.0, 0.5, 1.0} for found in starts.values())


def test_what_stands_beyond_sight_is_not_found(model):
    found = niah_grid(Reader(model[0], sight=60), model[1], HAY, [120], (0.0, 1.0), needles=5)
    assert [cell.recall for cell in found] == [0.0, 1.0]


def test_needles_follow_the_seed(model):
    def prompts(seed):
        reader = Reader(model[0])
        niah_grid(reader, model[1], HAY, [90], (0.5,), needles=3, seed=seed)
        return reader.prompts

    assert prompts(1) == prompts(1)
    assert len(prompts(1) & prompts(2)) == 0


def test_the_document_with_the_answer_stands_at_each_position(model):
    questions = made_questions(4, 3, seed=2)
    for question in questions:
        assert question.answers[0] in question.documents[0]
        name = question.question.rpartition(" ")[2].rstrip("?")
        assert not any(name in other for other in question.documents[1:])
    reader = Reader(model[0])
    cells = mdqa(reader, model[1], questions, (1, 3), num_documents=3)
    assert [(cell.length, cell.place, cell.found, cell.n) for cell in cells] == [
        (3, 1.0, 4, 4),
        (3, 3.0, 4, 4),
    ]
    placed = sum(q.documents[0] in prompt.split("\n")[0] for prompt in reader.prompts for q in questions)
    assert placed == 4
    near = mdqa(Reader(model[0], sight=100), model[1], questions, (1, 3), num_documents=3)
    assert [cell.recall for cell in near] == [0.0, 1.0]


def test_any_of_several_answers_counts(model):
    asked = made_questions(1, 2)[0]
    more = Question(asked.question, ("no such thing", *asked.answers), asked.documents)
    assert mdqa(Reader(model[0]), model[1], [more], (2,), num_documents=2)[0].recall == 1.0


def test_generated_text_is_looked_through(model, monkeypatch):
    network, tokenizer = model
    asked = made_questions(1, 2)[0]
    told = []

    def generate(input_ids, **options):
        told.append(options)
        said = torch.tensor([[*encode(f" It is THE {asked.answers[0].title()}, surely").tolist(), EOS]])
        return torch.cat([input_ids, said], 1)

    monkeypatch.setattr(network, "generate", generate)
    found = mdqa(network, tokenizer, [asked], (1,), num_documents=2, match="generate", suppress=[99])
    assert found[0].recall == 1.0
    assert told[0]["suppress_tokens"] == [99]
    other = Question(asked.question, ("quite another",), asked.documents)
    assert mdqa(network, tokenizer, [other], (1,), num_documents=2, match="generate")[0].recall == 0.0


def test_words_are_compared_whole():
    assert normalised("The Answer: 'a Fox'!") == "answer fox"
    assert normalised("theory") == "theory"


def test_both_are_tasks_of_evaluate(llama, tmp_path):
    hay = tmp_path / "hay.txt"
    hay.write_text(HAY)
    rows = [
        {"q": q.question, "a": list(q.answers), "d": list(q.documents)} for q in made_questions(3, 2, seed=1)
    ]
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = [
        "niah",
        "mdqa",
        TaskConfig(task=str(hay), kind="niah"),
        TaskConfig(task=str(file), kind="mdqa", prompt="q", column="a", choices="d"),
    ]
    scores = evaluate(llama, tasks, items=20, characters=2000)
    assert list(scores) == ["niah", "mdqa", "hay", "many"]
    assert {score.metric for score in scores.values()} == {"exact_match"}
    assert [score.n for score in scores.values()] == [20, 12, 20, 6]
    network, tokenizer = load_model(llama)
    read = evaluate(Reader(network), tasks, tokenizer=tokenizer, items=20, characters=2000)
    assert [score.value for score in read.values()] == [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [400]}, "niah: a prompt of 400 tokens is beyond the model's 384 positions"),
        ({"lengths": [50]}, "niah: 50 tokens have no room for the needle: it takes"),
        ({"lengths": []}, "expected at least one length"),
        ({"depths": (0.5, 50)}, "a depth must be in 0..1, got 50"),
        ({"haystack_text": ""}, "the haystack is empty"),
        ({"match": "guess"}, "match must be greedy or generate, got 'guess'"),
        (
            {"needle": "The {Code}"},
            "niah: needle 'The {Code}' can't be filled in, expected the fields {name}, {code}",
        ),
        ({"needle": "A {"}, "niah: needle 'A {' can't be filled in"),
        ({"needle": "{name[a]} {code}"}, "niah: needle '{name[a]} {code}' can't be filled in"),
        ({"needle": "Of {name}."}, "niah: needle 'Of {name}.' doesn't show {code}"),
        ({"question": "What is {code}"}, "niah: question 'What is {code}' can't be filled in"),
    ],
)
def test_a_grid_that_cant_be_is_named(model, arguments, message):
    good = {"haystack_text": HAY, "lengths": [90], "depths": (0.5,), "needles": 1}
    with pytest.raises(InputError) as caught:
        niah_grid(*model, **{**good, **arguments})
    assert message in str(caught.value)


def test_questions_that_cant_be_asked_are_named(model, tmp_path):
    questions = made_questions(2, 3)
    for positions, asked, message in (
        ((4,), questions, "position 4 is none of 3 documents"),
        ((1,), [], "there are no questions"),
        ((1,), [Question("q", ("a",), ("d",))], "question 1 has 1 documents and 1 answers, expected 3"),
    ):
        with pytest.raises(InputError, match=message):
            mdqa(*model, asked, positions, num_documents=3)
    for template, message in (
        (
            {"document": "Doc {n}"},
            "document 'Doc {n}' can't be filled in, expected the fields {number}, {text}",
        ),
        (
            {"document": "Doc {number}"},
            "document 'Doc {number}' doesn't show {text}, so nothing could be found",
        ),
        ({"question": "Answer:"}, "question 'Answer:' doesn't show {question}"),
        ({"positions": ()}, "expected at least one position"),
    ):
        with pytest.raises(InputError, match=re.escape(f"mdqa: {message}")):
            mdqa(*model, questions, **{"positions": (1,), "num_documents": 3, **template})
    with pytest.raises(InputError, match="beyond the model's 384 positions"):
        mdqa(*model, made_questions(1, 20), (1,))
    with pytest.raises(InputError, match="kind mdqa needs `prompt`"):
        check_tasks(TaskConfig(task=__file__, kind="mdqa"))
    with pytest.raises(InputError, match="the column of the documents, the one with the answer first"):
        check_tasks(TaskConfig(task=__file__, kind="mdqa", prompt="q"))
    with pytest.raises(InputError, match="kind bits needs a file, found `niah`"):
        check_tasks(TaskConfig(task="niah", kind="bits"))
    with pytest.raises(InputError, match="did you mean `niah`"):
        check_tasks("niahh")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "x", "a": "y", "d": "one text"}\n')
    task = TaskConfig(task=str(file), kind="mdqa", prompt="q", column="a", choices="d")
    with pytest.raises(InputError, match="expected documents as a list of texts, found 'one text'"):
        evaluate(model[0], task, tokenizer=model[1])
