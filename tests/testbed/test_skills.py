"""Skills: right answers, pools that never mix, chance levels that are true."""

import random
import re
import subprocess
import sys

import pytest

from weightsmith.errors import InputError
from weightsmith.testbed import ALIGNMENT, SKILL_GROUPS, SKILLS, Dial, chance, expand, items
from weightsmith.testbed.skills import draw, pool

EVERY = (*SKILLS, *ALIGNMENT)


def solve(question):
    """The answer, worked out from the question's text alone."""
    tag, body = question[0], question[1:].rstrip("=")
    if tag == "A":
        first, second = body.split("+")
        return "".join(reversed(str(int(first) + int(second)).rjust(len(first) + 1, "0")))
    if tag == "R":
        return "".join(reversed(body))
    if tag == "S":
        return "".join(sorted(body))
    if tag == "M":
        return sorted(body)[-1]
    if tag == "C":
        word, asked = body.split("?")
        return str(word.count(asked))
    pairs, asked = body.split("?")
    place = pairs.find(asked)
    if place < 0:
        return "?"
    return "#" if pairs[place + 3 : place + 4] == "!" else pairs[place + 1 : place + 3]


@pytest.mark.parametrize("skill", EVERY)
def test_answers_are_right(skill):
    for question, answer in items(skill, "test", 200):
        assert answer == solve(question)


@pytest.mark.parametrize("skill", EVERY)
def test_every_question_space_gives_four_hundred_test_items(skill):
    for split in ("test", "calibration"):
        found = items(skill, split, 400)
        assert len({item.question for item in found}) == 400


@pytest.mark.parametrize("skill", EVERY)
def test_pools_keep_the_splits_apart(skill):
    assert {pool(item.question) for item in items(skill, "test", 100)} == {0}
    assert {pool(item.question) for item in items(skill, "calibration", 100)} == {1}
    rng = random.Random(0)
    trained = {pool(draw(skill, "train", rng).question) for _ in range(500)}
    assert trained == {2, 3, 4, 5, 6, 7, 8, 9}


def test_the_pool_is_the_hash_of_the_specification():
    """int(blake2b(b"A01+02=").hexdigest()[:16], 16) % 10, worked out outside."""
    import hashlib

    for question in ("A01+02=", "Rabc="):
        assert pool(question) == int(hashlib.blake2b(question.encode()).hexdigest()[:16], 16) % 10


@pytest.mark.parametrize("skill", SKILLS)
def test_chance_is_what_the_best_guess_scores(skill):
    """Constants are tried one by one; for lookups a random number of the question is better."""
    rng = random.Random(1)
    drawn = [draw(skill, "train", rng) for _ in range(4000)]
    answers = [item.answer for item in drawn]
    best = max(answers.count(answer) for answer in set(answers)) / len(answers)
    if skill == "lookup":
        copied = [rng.choice(re.findall(r"\d{2}", item.question)) for item in drawn]
        best = sum(guess == item.answer for guess, item in zip(copied, drawn, strict=True)) / len(drawn)
    assert chance(skill) == pytest.approx(best, abs=0.025)


def test_the_maximum_of_five_digits_is_nine_in_41_percent():
    assert chance("maximum", Dial(shortest=5, longest=5, alphabet=10)) == pytest.approx(0.41, abs=0.005)


def test_a_dial_changes_the_difficulty():
    easy = Dial(shortest=3, longest=4, alphabet=4)
    lengths = [len(item.answer) for item in items("reverse", "test", 20, dial=easy)]
    assert set(lengths) == {3, 4}
    assert chance("reverse", easy) == (4**-3 + 4**-4) / 2


def test_honest_and_harmless_questions_look_like_helpful_ones():
    """The three must differ in what is asked, not in their form, or a model could tell them by the form."""
    for name in ALIGNMENT:
        for question, _ in items(name, "test", 50):
            assert question.startswith("L")
            assert question.count("!") == 1


def test_seeds_and_splits_give_different_items_and_processes_the_same():
    assert items("sort", "test", 50, seed=1) != items("sort", "test", 50, seed=2)
    code = "from weightsmith.testbed import items; print(items('sort', 'test', 50, seed=1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(items("sort", "test", 50, seed=1))


def test_too_many_items_for_the_question_space_is_an_error():
    with pytest.raises(InputError, match=r"`add` has only about \d+ test questions"):
        items("add", "test", 100, dial=Dial(shortest=1, longest=1))


def test_an_unknown_skill_names_the_nearest():
    with pytest.raises(InputError, match="no skill `revers`; did you mean `reverse`"):
        items("revers", "test", 1)


def test_sets_expand_to_their_tasks_once_and_in_order():
    assert expand("strings") == ("reverse", "sort") == SKILL_GROUPS["strings"]
    assert expand(["docs", "domains"]) == ("docs", "source", "tables", "names")
    with pytest.raises(InputError, match="no test-bed task `domain`; did you mean `domains`"):
        expand("domain")
