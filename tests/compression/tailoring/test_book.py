"""What a search knows of its trials: each cost is the mean over its own examples, whatever the order."""

import itertools

import pytest

from weightsmith.compression.tailoring.backends import Request
from weightsmith.compression.tailoring.book import Book
from weightsmith.compression.tailoring.evaluator import Outcome, Tally
from weightsmith.compression.tailoring.scoring import FunctionTask
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.trials import FORMAT, TrialLog
from weightsmith.errors import InputError

HEADER = {"seed": 0}
SCORES = {"long": tuple(number % 7 / 7 for number in range(27)), "short": (1.0, 0.0, 0.5, 0.25, 0.75)}
TASKS = [FunctionTask(name, lambda model, examples: [], size=len(found)) for name, found in SCORES.items()]
CONFIGURATION = Configuration.of(4, [1])
BUDGETS = (3, 9, 27)


def book_of(path):
    return Book(TASKS, TrialLog(path, HEADER), BUDGETS, max_failures=5, early_stop=False)


def measured(book, number):
    tally = Tally(*book.job(number))
    while tally.outcome is None:
        place, spans = tally.give()
        scored = {task: SCORES[task][slice(*span)] for task, span in spans.items() if span[0] < span[1]}
        tally.add(place, Outcome("ok", scored))
    return tally.outcome


def asked(book, budgets):
    """Ask one after the other; how many examples of the longer task were scored."""
    scored = 0
    for budget in budgets:
        for number in book.begin([Request(CONFIGURATION, budget)], 9):
            outcome = measured(book, number)
            scored += len(outcome.values.get("long", ()))
            book.take(number, outcome)
    return scored


def check_costs(book, budgets):
    for budget in budgets:
        for task, scores in SCORES.items():
            mean = sum(scores[:budget]) / len(scores[:budget])
            assert book.trials[CONFIGURATION.key, budget].costs[task] == pytest.approx(1 - mean, abs=1e-12)


@pytest.mark.parametrize("budgets", list(itertools.permutations(BUDGETS)))
def test_rungs_in_any_order_score_each_example_once(budgets):
    book = book_of(None)
    assert asked(book, budgets) == 27
    check_costs(book, BUDGETS)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_rungs_of_one_configuration_at_the_same_time_keep_their_examples(order):
    book = book_of(None)
    numbers = book.begin([Request(CONFIGURATION, budget) for budget in BUDGETS], 9)
    outcomes = {number: measured(book, number) for number in numbers}
    for place in order:
        book.take(numbers[place], outcomes[numbers[place]])
    check_costs(book, BUDGETS)


@pytest.mark.parametrize("first", list(itertools.permutations(BUDGETS)))
@pytest.mark.parametrize("then", [(27,), (9, 27), (27, 3), (9,)])
def test_a_log_serves_a_search_that_asks_in_another_order(first, then, tmp_path):
    asked(book_of(tmp_path / "trials.jsonl"), first)
    book = book_of(tmp_path / "trials.jsonl")
    assert asked(book, then) == 0
    check_costs(book, then)
    assert asked(book, BUDGETS) == 0


def test_a_search_that_leaves_out_a_rung_of_the_log_goes_on_from_all_its_examples(tmp_path):
    asked(book_of(tmp_path / "trials.jsonl"), (3, 9))
    book = book_of(tmp_path / "trials.jsonl")
    assert asked(book, (9, 27)) == 18
    check_costs(book, (9, 27))


def test_a_log_without_some_of_its_lines_names_the_place(tmp_path):
    path = tmp_path / "trials.jsonl"
    asked(book_of(path), BUDGETS)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"jsonl:2: scores from example 3 on, but 0 before it"):
        book_of(path)


def test_a_log_of_another_format_is_refused(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"format": 1, "seed": 0}\n')
    with pytest.raises(InputError, match=f"its first line has no format {FORMAT}"):
        book_of(path)
