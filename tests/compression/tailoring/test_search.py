"""The search: what it finds, what it asks, and how it goes on."""

import json
import logging

import pytest
import torch

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring import search as module
from weightsmith.compression.tailoring import workers
from weightsmith.compression.tailoring.backends import Request
from weightsmith.compression.tailoring.baselines import block_influence
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.scoring import FunctionTask, NonFiniteError
from weightsmith.compression.tailoring.space import Space
from weightsmith.compression.tailoring.trials import read_trials
from weightsmith.errors import InputError, MissingExtraError
from weightsmith.runs.atomic import read_lines

from .made import Likelihood, family, killed_after, llama

SMALL = {"min_budget": 2, "max_budget": 12, "n_trials": 40, "sparsity": 0.25}
BACKENDS = ["evolution", "random", "optuna"]


def asked(search):
    return [(trial.configuration.key, trial.budget) for trial in search.trials]


@pytest.fixture(scope="module")
def small():
    return family()


@pytest.mark.parametrize("optimizer", ["evolution", "random"])
def test_a_search_over_all_of_a_small_space_finds_its_optimum(optimizer):
    base, (candidate, *_) = family(depth=5)
    tasks = [Likelihood("one"), Likelihood("two", seed=8)]
    space = Space(depth=5, num_dropped=1, num_candidates=1, low=1.0, high=1.0)
    pool = LayerPool(base, [candidate])
    every = {
        configuration.key: [
            1 - sum(round(value, 6) for value in task.score(pool.assemble(configuration), range(12))) / 12
            for task in tasks
        ]
        for configuration in space.every()
    }
    assert len(every) == 80
    search = TailorSearch(
        base, [candidate], tasks=tasks, optimizer=optimizer, keep_layers=4, lambda_range=(1.0, 1.0),
        n_trials=200, min_budget=12, max_budget=12,
    )  # fmt: skip
    plan = search.run()
    assert {key for key, _ in asked(search)} == every.keys()
    assert len(search.trials) == 80
    lows = [min(costs[task] for costs in every.values()) for task in range(2)]
    spans = [max(costs[task] for costs in every.values()) - lows[task] for task in range(2)]
    best = min(every, key=lambda key: sum((every[key][task] - lows[task]) / spans[task] for task in range(2)))
    assert plan.configuration.key == best


@pytest.mark.parametrize("optimizer", BACKENDS)
def test_the_same_seed_asks_the_same_and_another_seed_something_else(small, optimizer):
    base, candidates = small

    def run(seed):
        search = TailorSearch(base, candidates, tasks=Likelihood(), optimizer=optimizer, seed=seed, **SMALL)
        search.run()
        return asked(search)

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert len(run(0)) == 40


@pytest.mark.parametrize("optimizer", BACKENDS)
def test_a_search_killed_at_any_trial_goes_on_as_if_it_had_not_been(small, optimizer, tmp_path):
    base, candidates = small
    options = dict(tasks=[Likelihood("one"), Likelihood("two", seed=8)], optimizer=optimizer, **SMALL)
    whole = TailorSearch(base, candidates, work=tmp_path / "whole", **options)
    expected = whole.run()
    for at in (1, 13, 31):
        work = tmp_path / f"killed-{at}"
        with killed_after(at):
            TailorSearch(base, candidates, work=work, **options).run()
        assert len(read_lines(work / "trials.jsonl")) == 1 + at
        again = TailorSearch(base, candidates, work=work, **options)
        assert again.run() == expected
        assert asked(again) == asked(whole)
        for one, other in zip(again.trials, whole.trials, strict=True):
            assert (one.id, one.costs, one.values) == (other.id, other.costs, other.values)


def test_a_finished_search_computes_nothing_again(small, tmp_path):
    base, candidates = small
    task = Likelihood()
    first = TailorSearch(base, candidates, tasks=task, work=tmp_path, **SMALL).run()
    task.calls.clear()
    again = TailorSearch(base, candidates, tasks=task, work=tmp_path, **SMALL)
    assert again.run() == first
    assert task.calls == []


def test_more_trials_go_on_from_the_ones_there_are(small, tmp_path):
    base, candidates = small
    whole = TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **SMALL)
    first = whole.run()
    more = TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **(SMALL | {"n_trials": 60}))
    second = more.run()
    assert asked(more)[:40] == asked(whole)
    assert len(asked(more)) == 60
    assert (first.settings["planned"], first.settings["n_trials"]) == (40, 40)
    # What makes it again is a search of as many trials as were planned, and one of all after it.
    assert (second.settings["planned"], second.settings["n_trials"]) == (40, 60)
    again = tmp_path / "again"
    for n_trials in (second.settings["planned"], second.settings["n_trials"]):
        options = SMALL | {"n_trials": n_trials}
        plan = TailorSearch(base, candidates, tasks=Likelihood(), work=again, **options).run()
    assert plan == second
    header, trials = read_trials(tmp_path / "trials.jsonl")
    assert [trial.id for trial in trials] == list(range(60))
    assert header["n_trials"] == 40


def test_the_log_of_another_search_is_refused(small, tmp_path):
    base, candidates = small
    TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **SMALL).run()
    with pytest.raises(InputError, match=r"trials\.jsonl: was made with seed = 0, this search has 3"):
        TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, seed=3, **SMALL).run()
    with pytest.raises(InputError, match=r"was made with tasks = .*last.*, this search has"):
        TailorSearch(base, candidates, tasks=Likelihood("other"), work=tmp_path, **SMALL).run()
    (tmp_path / "trials.jsonl").write_text('{"no": "log"}\n')
    with pytest.raises(InputError, match="not a log of trials"):
        TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **SMALL).run()


def test_no_example_of_a_configuration_is_scored_twice(small):
    base, candidates = small
    task = Likelihood()
    search = TailorSearch(base, candidates, tasks=task, **SMALL)
    search.run()
    per_configuration = {}
    for trial in search.trials:
        per_configuration.setdefault(trial.configuration.key, []).append(trial)
    assert any(len(trials) > 1 for trials in per_configuration.values())
    scored = sum(len(call) for call in task.calls)
    assert scored == sum(max(trial.budget for trial in trials) for trials in per_configuration.values())
    assert len(asked(search)) == len(set(asked(search)))


def test_the_score_of_a_higher_rung_is_that_of_scoring_all_its_examples(small):
    base, candidates = small
    task = Likelihood()
    search = TailorSearch(base, candidates, tasks=task, **SMALL)
    search.run()
    from weightsmith.compression.tailoring.scoring import example_order

    order, pool = example_order(task, 0), LayerPool(base, candidates)
    risen = [trial for trial in search.trials if 0 < len(trial.values.get("last", ())) < trial.budget]
    assert risen
    for trial in risen:
        model = pool.assemble(trial.configuration)
        values = [round(value, 6) for value in task.score(model, order[: trial.budget])]
        assert trial.costs["last"] == pytest.approx(1 - sum(values) / len(values), abs=2e-6)


def test_the_plan_is_the_best_of_the_highest_budget_and_its_front_is_undominated(small):
    base, candidates = small
    search = TailorSearch(base, candidates, tasks=[Likelihood("one"), Likelihood("two", seed=8)], **SMALL)
    plan = search.run()
    top = [trial for trial in search.trials if trial.budget == 12]
    assert plan.budget == 12
    assert plan.configuration in [point.configuration for point in plan.front]
    assert (plan.num_parameters, plan.base_parameters) == (
        plan.build().num_parameters(),
        base.num_parameters(),
    )
    assert 0 < plan.dropped_parameters < plan.dropped_share == 0.25
    for point in plan.front:
        assert not any(all(trial.costs[task] < point.costs[task] for task in ("one", "two")) for trial in top)
    other = plan.alternative(plan.front[-1].trial)
    assert other.settings == {**plan.settings, "trial": plan.front[-1].trial}
    assert other.configuration == plan.front[-1].configuration
    with pytest.raises(InputError, match="not in the Pareto set"):
        plan.alternative(10_000)


@pytest.mark.parametrize("forks", [True, False])
def test_several_processes_find_what_one_finds(small, tmp_path, monkeypatch, forks):
    if not forks:
        monkeypatch.setattr(workers, "_may_fork", lambda _: False)
    base, candidates = small
    options = {**SMALL, "n_trials": 14, "tasks": Likelihood()}
    one = TailorSearch(base, candidates, **options)
    expected = one.run()
    two = TailorSearch(base, candidates, num_workers=2, work=tmp_path, **options)
    assert two.run().configuration == expected.configuration
    assert asked(two) == asked(one)
    assert [trial.costs for trial in two.trials] == [trial.costs for trial in one.trials]


def test_removal_alone_and_blends_alone_are_searches_too(small):
    base, candidates = small
    removal = TailorSearch(base, tasks=Likelihood(), **SMALL)
    plan = removal.run()
    assert not any(layer.sources for layer in plan.configuration.layers)
    assert len(removal.trials) <= 4 * 3
    blends = TailorSearch(base, candidates, tasks=Likelihood(), **(SMALL | {"sparsity": 0.0}))
    assert blends.run().configuration.dropped == ()
    single = TailorSearch(base, candidates, tasks=Likelihood(), merge_methods=(), **SMALL)
    single.run()
    assert all(trial.configuration.num_merged == 0 for trial in single.trials)


def test_a_missing_optimiser_says_what_to_install(small, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "smac", None)
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name, extra in (("smac", "smac"), ("optuna", "search")):
        with pytest.raises(MissingExtraError, match=rf'pip install "weightsmith\[{extra}\]"'):
            TailorSearch(small[0], tasks=Likelihood(), optimizer=name, **SMALL).run()


def test_smac_asks_for_configurations_of_the_space_and_goes_on(small, tmp_path):
    pytest.importorskip("smac")
    base, candidates = small
    options = dict(
        tasks=[Likelihood("one"), Likelihood("two", seed=8)], optimizer="smac", generation=2, **SMALL
    )
    whole = TailorSearch(base, candidates, work=tmp_path, **options)
    plan = whole.run()
    assert len(whole.trials) == 40
    lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trials.jsonl").write_text("".join(lines[:15]))
    again = TailorSearch(base, candidates, work=tmp_path, **options)
    assert again.run() == plan
    assert asked(again) == asked(whole)


class Stubborn:
    """Asks for one configuration after the other, and for the first ones again without an end."""

    def __init__(self, configurations):
        self.configurations, self.asks = configurations, 0

    def ask(self):
        self.asks += 1
        return [Request(self.configurations[(self.asks - 1) % len(self.configurations)], 12)]

    def tell(self, trials):
        pass


@pytest.mark.parametrize("known", [4, 3])
def test_a_backend_that_never_ends_is_not_asked_when_nothing_is_left(small, monkeypatch, known):
    every = list(Space(depth=4, num_dropped=1).every())
    backend = Stubborn(every[:known])
    monkeypatch.setattr(TailorSearch, "_backend", lambda *_: backend)
    search = TailorSearch(small[0], tasks=Likelihood(), **(SMALL | {"min_budget": 12}))
    search.run()
    assert len(search.trials) == known
    # All of the space is known, or so many proposals in a row were known that the rest won't come.
    assert backend.asks == (4 if known == 4 else 3 + module._FRUITLESS)


def test_how_many_are_asked_at_once_does_not_change_when_to_give_up(small, monkeypatch):
    backend = Stubborn(list(Space(depth=4, num_dropped=1).every())[:1])
    ask = backend.ask
    backend.ask = lambda: ask() * 50
    monkeypatch.setattr(TailorSearch, "_backend", lambda *_: backend)
    TailorSearch(small[0], tasks=Likelihood(), **SMALL).run()
    assert backend.asks == 1 + module._FRUITLESS // 50


class Long(Likelihood):
    """Shows rows that are longer than the 64 positions of the models."""

    def token_rows(self, indices):
        return [(row * 10)[:100] for row in super().token_rows(indices)]


@pytest.mark.parametrize(("kind", "length"), [("gpt2", 64), ("llama", 100)])
def test_rows_to_compare_layers_on_are_cut_from_the_left_where_positions_end(monkeypatch, kind, length):
    seen = []

    def look(model, batches):
        seen.extend(row for batch in batches for row in batch.tolist())
        return block_influence(model, batches)

    monkeypatch.setattr(module, "block_influence", look)
    task = Long()
    TailorSearch(family(kind)[0], tasks=task, **(SMALL | {"n_trials": 2})).run()
    whole = task.token_rows(range(12))
    assert sorted(seen) == sorted(row[-length:] for row in whole)


def test_the_log_of_a_function_that_was_changed_is_refused(small, tmp_path):
    def run(function):
        task = FunctionTask("mine", function, 12)
        TailorSearch(small[0], tasks=task, work=tmp_path, **(SMALL | {"n_trials": 2})).run()

    def half(model, indices):
        return [0.5 for _ in indices]

    def third(model, indices):
        return [0.3 for _ in indices]

    run(half)
    run(half)
    with pytest.raises(InputError, match="was made with tasks"):
        run(third)


def scores(value):
    def function(model, indices):
        return [value for _ in indices]

    return FunctionTask("mine", function, 12)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_score_outside_of_nought_and_one_names_the_task_and_the_value(small, value):
    with pytest.raises(InputError, match=rf"task `mine`: scored {value}, .*cost must be 1 - score"):
        TailorSearch(small[0], tasks=scores(value), **SMALL).run()


def test_too_few_scores_are_an_error(small):
    task = FunctionTask("mine", lambda model, indices: [0.5], 12)
    with pytest.raises(InputError, match="returned 1 scores for 4 examples"):
        TailorSearch(small[0], tasks=task, **SMALL).run()


def test_a_fault_that_comes_back_ends_the_search_with_its_traceback(small, tmp_path):
    def function(model, indices):
        return [1 / 0 for _ in indices]

    search = TailorSearch(*small, tasks=FunctionTask("mine", function, 12), work=tmp_path, **SMALL)
    with pytest.raises(module.TailorError, match="5 trials failed by ZeroDivisionError") as raised:
        search.run()
    assert "return [1 / 0" in str(raised.value)
    assert len(read_lines(tmp_path / "trials.jsonl")) == 1 + 5
    assert not (tmp_path / "plan.json").exists()


def test_a_fault_of_a_few_trials_costs_those_trials_only(small, tmp_path):
    calls = []

    def function(model, indices):
        calls.append(len(calls))
        if len(calls) in (3, 5):
            raise RuntimeError(f"no. {len(calls)}")
        return [0.5 for _ in indices]

    search = TailorSearch(*small, tasks=FunctionTask("mine", function, 12), work=tmp_path, **SMALL)
    plan = search.run()
    failed = [trial for trial in search.trials if trial.status == "failed"]
    assert [trial.costs for trial in failed] == [{"mine": 1.0}] * 2
    assert "RuntimeError: no. 3" in failed[0].error
    assert plan.costs == {"mine": 0.5}


def test_all_trials_failed_shows_three_different_tracebacks(small):
    kinds = [KeyError, ValueError, TypeError, RuntimeError]
    calls = []

    def function(model, indices):
        calls.append(0)
        raise kinds[len(calls) % 4]("broken")

    task = FunctionTask("mine", function, 12)
    options = SMALL | {"n_trials": 8, "max_failures": 5}
    with pytest.raises(module.TailorError, match="all 8 trials failed") as raised:
        TailorSearch(*small, tasks=task, **options).run()
    assert str(raised.value).count("Traceback") == 3


def test_numbers_that_are_not_finite_cost_the_trial_and_are_said(small):
    def function(model, indices):
        if model.config.num_hidden_layers == 3 and model.model.layers[0].self_attn.q_proj.weight[0, 0] > 0:
            raise NonFiniteError("logits")
        return [0.5 for _ in indices]

    base, _ = small
    with torch.no_grad():
        flipped = llama()
        flipped.load_state_dict(base.state_dict())
        flipped.model.layers[0].self_attn.q_proj.weight[0, 0] *= -1
    search = TailorSearch(base, [flipped], tasks=FunctionTask("mine", function, 12), **SMALL)
    search.run()
    assert {trial.status for trial in search.trials} == {"ok", "nonfinite"}
    assert all(trial.costs["mine"] == 1 for trial in search.trials if trial.status == "nonfinite")


def test_few_examples_are_said_and_rungs_that_are_one_are_run_once(small, caplog):
    with caplog.at_level(logging.WARNING):
        search = TailorSearch(
            *small, tasks=Likelihood(size=4), sparsity=0.25, n_trials=20, min_budget=100, max_budget=1000
        )
        search.run()
    assert caplog.text.count("has 4 calibration examples, fewer than max_budget 1000") == 1
    assert {trial.budget for trial in search.trials} == {4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 1}, "eta: 1"),
        ({"n_trials": 0}, "n_trials: 0"),
        ({"min_budget": 9, "max_budget": 3}, "min_budget: 9, expected at most max_budget 3"),
        ({"optimizer": "grid"}, "optimizer: 'grid', expected evolution"),
        ({"edge": "left"}, "edge: 'left'"),
        ({"lambda_range": (1.0, 0.0)}, "lambda_range"),
        ({"lambda_range": (0.5,)}, r"lambda_range: \(0.5,\), expected \(least, largest\)"),
        ({"lambda_range": (0.33331, 0.33339)}, "expected .least, largest., in thousandths"),
        ({"merge_methods": ("ties",)}, "merge_methods: 'ties'"),
        ({"sparsity": "0.3"}, "sparsity: '0.3', expected a number"),
        ({"keep_layers": 2.5}, r"keep_layers: 2\.5, expected a whole number"),
        ({"n_trials": True}, "n_trials: True, expected a whole number"),
        ({"early_stop": "no"}, "early_stop: 'no', expected true or false"),
        ({"trials": 9}, "unexpected keyword argument 'trials'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options, words):
    with pytest.raises(InputError, match=words):
        TailorSearch("nowhere", tasks="source", **options)


def test_a_bare_function_is_no_task(small):
    with pytest.raises(InputError, match=r"tasks: found <.*>, expected names or tasks; .* FunctionTask\("):
        TailorSearch(small[0], tasks=[lambda model, indices: [1.0]], sparsity=0.25).run()


def test_the_number_of_layers_is_asked_for_once(small):
    with pytest.raises(InputError, match=r"give one of sparsity and keep_layers \(1\.\.4\), found neither"):
        TailorSearch(small[0], tasks=Likelihood()).run()


def test_the_log_is_lines_of_json_that_others_can_read(small, tmp_path):
    base, candidates = small
    TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **(SMALL | {"n_trials": 5})).run()
    header, *lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert header["method"] == "gptailor"
    assert sorted(line["id"] for line in lines) == list(range(5))
    assert all(0 <= line["costs"]["last"] <= 1 for line in lines)
