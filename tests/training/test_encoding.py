"""Texts as token ids in batches: the same as one by one, whatever the tokenizer was told before."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from weightsmith.errors import InputError
from weightsmith.testbed import write_model_folder
from weightsmith.testbed.alphabet import EOS
from weightsmith.training import encode_pairs
from weightsmith.training.encoding import token_ids

TEXTS = ["", "a", "some words", "<eos> is no end", "x" * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder("xs", tmp_path_factory.mktemp("bed"))


@pytest.fixture
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def one_by_one(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("split", [False, True])
def test_batches_give_what_single_texts_give(tokenizer, split):
    tokenizer.split_special_tokens = split
    texts = [f"{text}{number}" for number in range(600) for text in TEXTS]
    assert list(token_ids(tokenizer, iter(texts))) == one_by_one(tokenizer, texts)
    marked = next(token_ids(tokenizer, ["<eos>"]))
    assert (marked == [EOS]) is not split


def test_what_the_tokenizer_was_told_before_is_forgotten(tokenizer):
    wanted = one_by_one(tokenizer, TEXTS)
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    assert list(token_ids(tokenizer, TEXTS)) == wanted


def test_a_tokenizer_with_a_call_of_its_own_is_called(folder):
    class Loud(PreTrainedTokenizerFast):
        def __call__(self, text, **options):
            return super().__call__([one.upper() for one in text], **options)

    loud = Loud.from_pretrained(folder)
    assert list(token_ids(loud, ["abc"])) == one_by_one(
        PreTrainedTokenizerFast.from_pretrained(folder), ["ABC"]
    )


def test_pairs_are_rows_whose_prompts_are_no_labels(tokenizer):
    prompts, answers = ["2+2=", "", "a longer prompt: "], ["4", "alone", ""]
    made = encode_pairs(tokenizer, prompts, answers)
    assert {row.dtype for column in made.values() for row in column} == {np.dtype("int64")}
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        (p, a) = one_by_one(tokenizer, [prompt, answer])
        assert made["input_ids"][number].tolist() == [*p, *a, EOS]
        assert made["labels"][number].tolist() == [-100] * len(p) + [*a, EOS]
    assert encode_pairs(tokenizer, [], []) == {"input_ids": [], "labels": []}


@pytest.mark.parametrize(
    ("length", "prompt", "answer"),
    [(20, "abcdef", "wxyz"), (8, "def", "wxyz"), (5, "", "wxyz"), (3, "", "wx")],
)
def test_a_long_row_loses_the_beginning_of_its_prompt_first(tokenizer, length, prompt, answer):
    made = encode_pairs(tokenizer, ["abcdef"], ["wxyz"], max_length=length)
    np.testing.assert_equal(made, encode_pairs(tokenizer, [prompt], [answer]))
    assert len(made["input_ids"][0]) <= length


def test_pairs_that_are_none_are_refused(tokenizer):
    with pytest.raises(InputError, match="2 prompts and 1 answers"):
        encode_pairs(tokenizer, ["a", "b"], ["c"])
    with pytest.raises(InputError, match="max_length: 1"):
        encode_pairs(tokenizer, ["a"], ["c"], max_length=1)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        encode_pairs(tokenizer, ["a"], ["c"])
