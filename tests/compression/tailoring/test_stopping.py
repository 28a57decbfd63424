"""Trials that are given up while they are scored: never one that mattered, the same whoever computes."""

import itertools
import random
from contextlib import nullcontext

import pytest
import torch

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring import search as module
from weightsmith.compression.tailoring.evaluator import Outcome, Tally
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.scoring import FunctionTask, example_order
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.stopping import Cut, edges, pieces
from weightsmith.compression.tailoring.trials import read_trials
from weightsmith.runs.atomic import read_lines

from .made import family, killed_after

SIZE = 144
OPTIONS = {"min_budget": 48, "max_budget": SIZE, "n_trials": 120, "sparsity": 0.25}


class Graded:
    """Right on the share of the examples that one weight of each layer says; counts what is scored."""

    def __init__(self, place):
        self.place, self.count = place, 0

    def __call__(self, model, indices):
        self.count += len(indices)
        layers = model.model.layers
        quality = torch.sigmoid(4 * sum(layer.self_attn.q_proj.weight[self.place, 0] for layer in layers))
        return [float((0.61803 * (index + 1)) % 1.0 < quality) for index in indices]


def graded(*places):
    return [FunctionTask(f"graded-{place}", Graded(place), SIZE) for place in places]


def facts(search):
    return [
        (trial.id, trial.configuration.key, trial.budget, trial.status, trial.costs, trial.values)
        for trial in search.trials
    ]


@pytest.fixture(scope="module")
def models():
    return family()


@pytest.mark.parametrize(("optimizer", "budgets"), [("evolution", {SIZE}), ("random", {48, SIZE})])
def test_on_one_task_the_search_finds_the_same_and_scores_less(models, optimizer, budgets):
    base, candidates = models
    found = {}
    for early in (True, False):
        (task,) = graded(0)
        options = OPTIONS | {"optimizer": optimizer, "early_stop": early}
        search = TailorSearch(base, candidates, tasks=task, **options)
        plan = search.run()
        asked = [(trial.configuration.key, trial.budget) for trial in search.trials]
        found[early] = (asked, plan.configuration, plan.costs, plan.front)
        if early:
            stopped, scored = [t for t in search.trials if t.status == "stopped"], task.function.count
        else:
            assert all(trial.status == "ok" for trial in search.trials)
            assert scored < 0.9 * task.function.count
    assert found[True] == found[False]
    assert {trial.budget for trial in stopped} == budgets
    assert all(sum(map(len, trial.values.values())) < trial.budget for trial in stopped)


def test_what_is_given_up_is_worse_than_what_went_on_or_can_be_chosen(models):
    base, candidates = models
    tasks = graded(0, 3)
    search = TailorSearch(base, candidates, tasks=tasks, **OPTIONS)
    search.run()
    pool = LayerPool(base, candidates)
    stopped = [trial for trial in search.trials if trial.status == "stopped"]
    assert stopped
    for trial in stopped:
        model = pool.assemble(trial.configuration)
        whole = {}
        for task in tasks:
            used = example_order(task, 0)[: trial.budget]
            whole[task.name] = 1 - sum(task.score(model, used)) / len(used)
        better = [
            other
            for other in search.trials
            if other.budget == trial.budget
            and other.status == "ok"
            and all(other.costs[name] <= cost + 1e-12 for name, cost in whole.items())
            and any(other.costs[name] < cost - 1e-9 for name, cost in whole.items())
        ]
        assert better


def test_the_log_says_what_the_search_used(models, tmp_path):
    base, candidates = models
    search = TailorSearch(base, candidates, tasks=graded(0, 3), work=tmp_path, **OPTIONS)
    search.run()
    _, logged = read_trials(tmp_path / "trials.jsonl")
    assert [trial.to_json() for trial in logged] == [trial.to_json() for trial in search.trials]
    assert any(trial.status == "stopped" for trial in logged)
    known = {}
    for line in read_lines(tmp_path / "trials.jsonl")[1:]:
        for task, cost in line["costs"].items():
            values = known.setdefault((str(line["configuration"]), task), [])
            values += line["values"].get(task, [])
            used = values[: line["budget"]]
            assert cost == pytest.approx(1 - sum(used) / len(used))
            assert len(used) == line["budget"] or line["status"] == "stopped"


@pytest.mark.parametrize("optimizer", ["evolution", "optuna"])
def test_a_killed_search_gives_up_the_same_trials(models, optimizer, tmp_path):
    base, candidates = models
    options = OPTIONS | {"optimizer": optimizer}
    whole = TailorSearch(base, candidates, tasks=graded(0, 3), **options)
    plan = whole.run()
    for at in (5, 24, 47):
        with killed_after(at):
            TailorSearch(base, candidates, tasks=graded(0, 3), work=tmp_path / str(at), **options).run()
        again = TailorSearch(base, candidates, tasks=graded(0, 3), work=tmp_path / str(at), **options)
        assert again.run() == plan
        assert facts(again) == facts(whole)


def test_a_search_that_ended_within_a_rung_goes_on_as_if_it_had_not(models, tmp_path):
    base, candidates = models
    for first in (23, 27, 41):
        work = tmp_path / str(first)
        # How many starts there are depends on the trials that a search began with.
        options = OPTIONS | {"n_trials": first}
        TailorSearch(base, candidates, tasks=graded(0, 3), work=work, **options).run()
        more = TailorSearch(base, candidates, tasks=graded(0, 3), work=work, **(options | {"n_trials": 60}))
        plan = more.run()
        replayed = TailorSearch(
            base, candidates, tasks=graded(0, 3), work=work, **(options | {"n_trials": 60})
        )
        assert replayed.run() == plan
        assert facts(replayed) == facts(more)
        _, logged = read_trials(work / "trials.jsonl")
        assert [trial.to_json() for trial in logged] == [trial.to_json() for trial in more.trials]


class OutOfOrder:
    """As many workers as there are pieces: none knows of another, and the last is first to answer."""

    def __init__(self, evaluator):
        self.evaluator = evaluator

    def outcomes(self, numbers, job):
        tallies = {number: Tally(*job(number)) for number in numbers}
        for number, tally in reversed(tallies.items()):
            given = [tally.give() for _ in range(tally.num_left)]
            for place, spans in reversed(given):
                tally.add(place, self.evaluator(tally.configuration, spans))
            yield number, tally.outcome


def test_workers_that_know_nothing_of_one_another_change_nothing(models, tmp_path, monkeypatch):
    base, candidates = models
    one = TailorSearch(base, candidates, tasks=graded(0, 3), work=tmp_path / "one", **OPTIONS)
    plan = one.run()
    monkeypatch.setattr(module, "workers", lambda evaluator, *_: nullcontext(OutOfOrder(evaluator)))
    many = TailorSearch(base, candidates, tasks=graded(0, 3), work=tmp_path / "many", **OPTIONS)
    assert many.run() == plan
    assert facts(many) == facts(one)
    lines = [read_lines(tmp_path / name / "trials.jsonl") for name in ("one", "many")]
    for line in itertools.chain(*lines):
        line.pop("seconds", None)
    assert lines[0] == lines[1]


def test_a_trial_is_hopeless_where_no_way_to_go_on_saves_it():
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        totals = {"a": 4, "b": 3}
        rivals = [
            {task: rng.randint(0, total) / total for task, total in totals.items()}
            for _ in range(rng.randint(0, 4))
        ]
        values = {
            task: [float(rng.random() < 0.5) for _ in range(rng.randint(0, total))]
            for task, total in totals.items()
        }
        survivors = rng.randint(1, 2)
        cut = Cut(survivors, rivals, {task: (0.0, 0) for task in totals}, totals)
        rests = [itertools.product((0.0, 1.0), repeat=totals[task] - len(values[task])) for task in totals]
        saved = False
        for a, b in itertools.product(*map(list, rests)):
            costs = {"a": 1 - (sum(values["a"]) + sum(a)) / 4, "b": 1 - (sum(values["b"]) + sum(b)) / 3}
            better = [
                rival
                for rival in rivals
                if all(rival[task] <= costs[task] + 1e-12 for task in costs)
                and any(rival[task] < costs[task] - 1e-12 for task in costs)
            ]
            saved = saved or len(better) < survivors
        assert cut.is_hopeless(values) == (not saved)
        seen.add(saved)
    assert seen == {True, False}


def test_scores_of_lower_rungs_count():
    cut = Cut(1, [{"a": 0.5}], {"a": (1.0, 4)}, {"a": 8})
    assert not cut.is_hopeless({"a": [1.0]})  # three of eight wrong so far, as many more may be right
    assert cut.is_hopeless({"a": [0.0, 0.0]})


RUNGS = (30, 90, 270, 1000)


@pytest.mark.parametrize(
    "spans", [{"a": (0, 5)}, {"a": (33, 100), "b": (10, 11)}, {"a": (0, 1000), "b": (0, 90)}, {"a": (7, 7)}]
)
def test_pieces_cover_the_spans_once_and_in_order(spans):
    parts = pieces(spans, edges(RUNGS))
    for task, (start, stop) in spans.items():
        covered = [index for part in parts for index in range(*part[task])]
        assert covered == list(range(start, stop))


def test_a_trial_that_begins_at_a_higher_budget_has_the_pieces_of_those_that_came_up_to_it():
    ends = edges(RUNGS)
    whole = pieces({"a": (0, 270), "b": (0, 100)}, ends)
    steps = [
        part
        for low, high in itertools.pairwise((0, *RUNGS[:3]))
        for part in pieces({"a": (low, high), "b": (min(low, 100), min(high, 100))}, ends)
    ]
    assert whole == steps
    assert [part["a"][1] for part in whole] == [30, 50, 70, 90, 135, 180, 225, 270]


def test_pieces_of_several_budgets_end_at_each_and_are_not_small():
    for rungs in ([5], [48, 144], [100, 300, 1000], [1, 2, 3]):
        ends = edges(rungs)
        assert set(rungs) <= set(ends)
        assert list(ends) == sorted(set(ends))
        for low, high in itertools.pairwise((0, *rungs)):
            inside = [low, *(end for end in ends if low < end <= high)]
            assert len(inside) - 1 == max(1, min(4, (high - low) // 16))


def test_pieces_count_in_order_and_no_further_than_where_a_trial_ends():
    cut = Cut(1, [{"a": 0.5}], {"a": (0.0, 0)}, {"a": 8})
    parts = pieces({"a": (0, 8)}, [2, 4, 6, 8])
    tally = Tally(Configuration.of(4), parts, cut)
    given = [tally.give() for _ in range(4)]
    assert [spans["a"] for _, spans in given] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    for place, values in ((3, (1.0, 1.0)), (2, (0.0, 0.0)), (1, (0.0, 0.0))):
        tally.add(place, Outcome("ok", {"a": values}, 1.0))
        assert tally.outcome is None
    tally.add(0, Outcome("ok", {"a": (1.0, 0.0)}, 1.0))
    # After three pieces five of eight are wrong, which one rival beats for sure.
    assert tally.outcome == Outcome("stopped", {"a": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}, 3.0)
    assert tally.num_left == 0


def test_a_piece_that_fails_ends_the_trial_where_it_stands():
    tally = Tally(Configuration.of(4), pieces({"a": (0, 8)}, [2, 4, 6, 8]), None)
    (one, _), (two, _), (three, _) = (tally.give() for _ in range(3))
    tally.add(three, Outcome("nonfinite", seconds=1.0))
    tally.add(two, Outcome("failed", seconds=1.0, kind="ValueError", error="..."))
    assert tally.outcome is None
    assert tally.num_left == 1
    tally.add(one, Outcome("ok", {"a": (1.0, 1.0)}, 1.0))
    assert tally.outcome == Outcome("failed", seconds=2.0, kind="ValueError", error="...")
    assert tally.num_left == 0
