"""Domains: real text, split by document, the same in every process."""

import subprocess
import sys

import pytest

from weightsmith.errors import InputError
from weightsmith.testbed import CHARACTERS, DOMAINS, documents, passages, text
from weightsmith.testbed.domains import SPLITS


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_tenth_is_held_out_and_halved(domain):
    size = {split: sum(map(len, documents(domain, split))) for split in SPLITS}
    total = sum(size.values())
    assert 0.08 < (size["calibration"] + size["test"]) / total <= 0.1
    assert size["calibration"] == pytest.approx(size["test"], rel=0.05)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_document_is_in_two_splits(domain):
    train, calibration, test = (set(documents(domain, split)) for split in SPLITS)
    assert not train & calibration
    assert not train & test
    assert not calibration & test


@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_hold_only_the_alphabet(domain):
    assert set(text(domain, "test")) <= set(CHARACTERS)


def test_another_process_makes_the_same_split():
    code = (
        "import hashlib; from weightsmith.testbed import DOMAINS, text;"
        "texts = ''.join(text(d, s) for d in DOMAINS for s in ('train', 'test'));"
        "print(hashlib.sha256(texts.encode()).hexdigest())"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second


def test_passages_are_pieces_of_the_text_from_its_whole_length():
    whole = text("source", "test")
    pieces = passages("source", "test", 20_000)
    assert [len(piece) for piece in pieces] == [1000] * 20
    step = (len(whole) - 1000) // 19
    assert all(whole.startswith(piece, number * step) for number, piece in enumerate(pieces))


def test_a_short_split_is_one_passage():
    assert passages("docs", "test", 10**9) == (text("docs", "test"),)


def test_fewer_characters_than_a_passage_are_one_short_passage():
    assert [len(piece) for piece in passages("names", "test", 300)] == [300]


@pytest.mark.parametrize(
    ("domain", "split", "message"),
    [("sources", "test", "did you mean `source`"), ("docs", "calib", "no split `calib`; did you mean")],
)
def test_an_unknown_name_names_the_nearest(domain, split, message):
    with pytest.raises(InputError, match=message):
        documents(domain, split)
