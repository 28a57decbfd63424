"""Windows and answers against plain loops and closed forms."""

import inspect
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from weightsmith.evaluation import likelihood, load_model
from weightsmith.evaluation.likelihood import answers, start_token, text_nats, windows
from weightsmith.testbed.alphabet import EOS, encode


@pytest.mark.parametrize("length", [1, 2, 7, 96])
@pytest.mark.parametrize("num_tokens", [0, 1, 6, 7, 8, 95, 96, 97, 143, 144, 145, 1000])
def test_windows_score_every_token_once_with_half_a_window_of_context(num_tokens, length):
    scored = []
    for first, count in windows(num_tokens, length):
        width = min(length, num_tokens)
        assert 0 <= first <= num_tokens - width
        places = range(first + width - count, first + width)
        assert all(place == 0 or place - first >= length // 2 - 1 or first == 0 for place in places)
        scored += places
    assert scored == list(range(num_tokens))


def one_by_one(model, tokens, length):
    """Each token from its own window, by the documented rule, one forward pass per token."""
    import torch

    inputs = [EOS, *tokens[:-1]]
    total = 0.0
    for first, count in windows(len(tokens), length):
        width = min(length, len(tokens))
        for place in range(first + width - count, first + width):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([inputs[first : place + 1]])).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[tokens[place]])
    return total


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_batches_of_windows_give_what_a_plain_loop_gives(llama, batch_size):
    model, tokenizer = load_model(llama)
    texts = [
        encode(text) for text in ("The quick brown fox jumps over the lazy dog.\n", "ab", "x" * 16, "y" * 17)
    ]
    got = sum(text_nats(model, texts, start_token(tokenizer), 16, batch_size))
    wanted = sum(one_by_one(model, text.tolist(), 16) for text in texts)
    assert got == pytest.approx(wanted, rel=1e-5)


def test_an_empty_text_costs_nothing(llama):
    model, _ = load_model(llama)
    assert sum(text_nats(model, [encode("")], EOS, 16)) == 0


def test_answers_are_what_a_plain_loop_gives(llama):
    import torch

    model, _ = load_model(llama)
    pairs = [
        ([EOS, *encode(p).tolist()], [*encode(a).tolist(), EOS]) for p, a in (("A12=", "3"), ("R", "abcde"))
    ]
    found = dict(entry for batch in answers(model, pairs) for entry in batch)
    for index, (prompt, answer) in enumerate(pairs):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
        wanted = sum(
            float(logits[len(prompt) - 1 + place].log_softmax(-1)[token])
            for place, token in enumerate(answer)
        )
        assert found[index].log_likelihood == pytest.approx(wanted, rel=1e-5)


def test_an_answer_is_greedy_exactly_when_generation_gives_it(llama):
    """Half of the answers are what the model itself generates, half have one token changed."""
    import torch

    model, _ = load_model(llama)
    pairs, generated = [], []
    for text in ("A12=", "hello", "R", "La3c7?c"):
        prompt = [EOS, *encode(text).tolist()]
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=EOS
        )[0, len(prompt) :].tolist()
        pairs += [(prompt, answer), (prompt, [*answer[:-1], (answer[-1] + 1) % 96])]
        generated += [True, False]
    found = dict(entry for batch in answers(model, pairs, batch_size=3) for entry in batch)
    assert [found[index].is_greedy for index in range(len(pairs))] == generated


def test_answers_that_differ_in_their_last_token_are_read_off_one_row(llama):
    import torch

    model, _ = load_model(llama)
    prompt, other = ([EOS, *encode(text).tolist()] for text in ("which of them? ", "or "))
    pairs = [(prompt, [7]), (other, [7]), (prompt, [3]), (prompt, [7, 3]), (prompt, [7, 5]), (prompt, [])]
    # The same ids with another place of the answer are another row to a model that decides on prompts.
    pairs.append(([*prompt, 7], [3]))
    seen = []
    forward = model.forward

    def counted(**inputs):
        seen.append(inputs["input_ids"].shape[0])
        return forward(**inputs)

    model.forward = counted
    model.forward.__signature__ = inspect.signature(forward)
    found = dict(entry for batch in answers(model, pairs) for entry in batch)
    assert sum(seen) == 4
    for index, (before, answer) in enumerate(pairs):
        with torch.no_grad():
            logits = forward(input_ids=torch.tensor([[*before, *answer]])).logits[0].log_softmax(-1)
        rows = logits[len(before) - 1 : len(before) - 1 + len(answer)]
        wanted = sum(float(row[token]) for row, token in zip(rows, answer, strict=True))
        assert found[index].log_likelihood == pytest.approx(wanted, rel=1e-5)
        assert found[index].is_greedy == (rows.argmax(-1).tolist() == answer)


class Model:
    """What batches are made by."""

    def __init__(self, device, vocabulary):
        self.device = SimpleNamespace(type=device)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))


class Choosing(Model):
    for_prompts = None


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (Model("cpu", 100), None),
        (Model("cuda", 100), None),
        (Model("cpu", 200_000), None),
        (Choosing("cpu", 100), None),
        (Model("cpu", 100), 7),
    ],
)
def test_batches_are_as_large_as_they_may_be_and_no_larger(model, size):
    lengths = sorted(random.Random(0).choices([3, 5, 40, 41, 700, 5000], k=300))
    rows = [(max(1, length - place % 7), tuple(range(length))) for place, length in enumerate(lengths)]
    batches = list(likelihood._row_batches(model, rows, size))
    assert [row for batch in batches for row in batch] == rows

    def is_allowed(batch):
        if size is not None:
            return len(batch) <= size
        width = len(batch[-1][1])
        kept = width - min(start for start, _ in batch) + 1
        tokens = 1024 if model.device.type == "cpu" else 16_384
        logits = 4 * len(batch) * kept * model.config.get_text_config().vocab_size
        most = 16 if isinstance(model, Choosing) else len(rows)
        padding = max(
            (
                place * (len(b) - len(a))
                for place, ((_, a), (_, b)) in enumerate(itertools.pairwise(batch), 1)
            ),
            default=0,
        )
        if padding > tokens // 16 or len(batch) > most:
            return False
        return len(batch) * width <= tokens and logits <= 64 * 1024**2

    for batch, following in itertools.pairwise(batches):
        assert len(batch) == 1 or is_allowed(batch)
        assert not is_allowed([*batch, following[0]])


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(uniform):
    model, _ = load_model(uniform)
    tokens = np.concatenate([encode("some text of any kind, longer than one window\n")] * 5)
    nats = sum(text_nats(model, [tokens], EOS, 32))
    assert nats / math.log(2) / len(tokens) == pytest.approx(math.log2(100), rel=1e-6)
