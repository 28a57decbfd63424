"""Trials per minute of a search for a tailored model, against a loop that writes and loads every candidate.

    python benchmarks/tailoring.py [--trials 300] [--rounds 3] [--sizes xs s] [--settings few skills text]
    [--out benchmarks/results/tailoring.json]

A base and three fine-tunes of the test-bed's sizes, weights random: what is timed hardly depends on them.
Ours is a whole search, models loaded from their folders. The loop treats every tenth of that search's trials,
evenly from each budget, as the public code does: read the tensors of all sources, combine them, write a
checkpoint, load it, score all examples of the budget; its minutes are those of the others, too, by budget.
Scorer and examples are the same; first the costs of both are checked to be the same.

Three settings: two texts and a skill at budgets 30 to 270, as in our evidence; three skills, whose prompts
are short, at 9 to 81; and these at 3 to 27. Each on one core, and on all cores: ours with a worker on each,
the loop with torch's threads. Beside the ratio stands the most that any search could reach which asks for the
same trials and has the same scorer: were everything but scoring free, no layer run twice on the same input,
and all cores busy all the time. On a CPU, forward passes over some hundred tokens take as long as writing and
reading the weights, whatever their number, so what the disk costs the loop is soon a small part.

Then what a trial costs outside of scoring, and what an optimiser takes to decide what is tried next.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring import evaluator
from weightsmith.compression.tailoring.backends import History, Racing
from weightsmith.compression.tailoring.designs import starts
from weightsmith.compression.tailoring.evolution import Evolution
from weightsmith.compression.tailoring.scoring import example_order
from weightsmith.compression.tailoring.space import Configuration, Space
from weightsmith.compression.tailoring.tasks import calibration_tasks
from weightsmith.compression.tailoring.tpe import TPE
from weightsmith.compression.tailoring.trials import Trial
from weightsmith.runs.environment import cores, environment
from weightsmith.testbed import write_model_folder

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "text": (("source", "docs", "sort"), 30, 270),
    "skills": (("sort", "maximum", "count"), 9, 81),
    "few": (("sort", "maximum", "count"), 3, 27),
}
"""Tasks, lowest and highest budget."""
FLOOR, GOAL, OVERHEAD, ASK = 5.0, 8.0, 0.05, 0.010
SAMPLED = 10


def family(folder: Path, size: str) -> list[Path]:
    """A base and three fine-tunes in folders."""
    base = write_model_folder(size, folder / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model.save_pretrained(base)
    made = [base]
    for number in range(1, 4):
        made.append(write_model_folder(size, folder / f"tuned-{number}"))
        torch.manual_seed(number)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.003 * torch.randn_like(value)
        model.save_pretrained(made[-1])
    return made


def search(models: Sequence[Path], setting: str, trials: int, seed: int, workers: int = 1) -> TailorSearch:
    """Ours, over one set of trials."""
    tasks, low, high = SETTINGS[setting]
    return TailorSearch(
        models[0],
        models[1:],
        tasks=tasks,
        sparsity=0.25,
        n_trials=trials,
        seed=seed,
        min_budget=low,
        max_budget=high,
        num_workers=workers,
        early_stop=False,  # the loop scores every candidate to its end
    )


class Loop:
    """A plain formulation of the public code's trial: everything goes through the disk.

    Attributes:
        scoring: Seconds of scoring so far.
    """

    def __init__(self, models: Sequence[Path], setting: str, seed: int) -> None:
        self.models, self.scoring = models, 0.0
        names, _, most = SETTINGS[setting]
        tokenizer = AutoTokenizer.from_pretrained(models[0])
        config = AutoConfig.from_pretrained(models[0])
        base = AutoModelForCausalLM.from_pretrained(models[0]).eval()
        tasks = calibration_tasks(names, tokenizer, config.to_dict(), examples=most)
        self.tasks = [task.prepare(base) for task in tasks]
        self.orders = {task.name: example_order(task, seed) for task in self.tasks}

    def costs(self, configuration: Configuration, budget: int) -> dict[str, float]:
        """Of one trial."""
        states = [load_file(folder / "model.safetensors") for folder in self.models]
        config = AutoConfig.from_pretrained(self.models[0])
        config.num_hidden_layers = len(configuration.layers)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(combined(configuration, states))
        folder = tempfile.mkdtemp()
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        shutil.rmtree(folder)
        begun = time.perf_counter()
        scores = {task.name: task.score(model, self.orders[task.name][:budget]) for task in self.tasks}
        self.scoring += time.perf_counter() - begun
        return {name: 1 - sum(values) / len(values) for name, values in scores.items()}


def looped(
    models: Sequence[Path], setting: str, seed: int, trials: Sequence[Trial]
) -> tuple[float, float, float]:
    """Seconds of the loop over the trials of a search, those of them that are scoring, and those of one trial
    outside of scoring.
    """
    begun = time.perf_counter()
    loop = Loop(models, setting, seed)
    whole, timed = time.perf_counter() - begun, 0
    outside, scoring = 0.0, 0.0
    for budget in sorted({trial.budget for trial in trials}):
        rung = [trial for trial in trials if trial.budget == budget]
        chosen = rung[::SAMPLED]
        started, before = time.perf_counter(), loop.scoring
        for trial in chosen:
            loop.costs(trial.configuration, trial.budget)
        took, scored = time.perf_counter() - started, loop.scoring - before
        whole += took * len(rung) / len(chosen)
        scoring += scored * len(rung) / len(chosen)
        outside += took - scored
        timed += len(chosen)
    return whole, scoring, outside / timed


def needed(setting: str, trials: Sequence[Trial]) -> float:
    """The part of the loop's passes through layers, by examples, that no other trial of the search does, too:
    each layer once for each example and each list of layers up to it.
    """
    run, seen = 0, set()
    for trial in trials:
        prefixes = list(accumulate(trial.configuration.key.split(";"), lambda one, two: f"{one};{two}"))
        run += len(SETTINGS[setting][0]) * trial.budget * len(prefixes)
        for task, values in trial.values.items():
            start = trial.starts[task]
            seen.update(product((task,), prefixes, range(start, start + len(values))))
    return len(seen) / run


def combined(configuration: Configuration, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tensors of a configuration by their new names."""
    first, last = configuration.layers[0], configuration.layers[-1]
    outside = {"model.embed_tokens.weight": first, "model.norm.weight": last, "lm_head.weight": last}
    made = {name: mixed(name, layer, states) for name, layer in outside.items()}
    for place, layer in enumerate(configuration.layers):
        prefix = f"model.layers.{layer.layer}."
        for name in states[0]:
            if name.startswith(prefix):
                made[f"model.layers.{place}.{name.removeprefix(prefix)}"] = mixed(name, layer, states)
    return made


def mixed(name: str, layer: Any, states: Sequence[dict[str, Any]]) -> Any:
    if len(layer.sources) < 2:
        return states[layer.sources[0] if layer.sources else 0][name]
    base = states[0][name]
    return base + layer.weight * sum(states[source][name] - base for source in layer.sources)


def agree(models: Sequence[Path], setting: str) -> str:
    """Costs of some trials are the same either way."""
    ours, loop = search(models, setting, 8, seed=99), Loop(models, setting, seed=99)
    ours.run()
    away = 0.0
    for trial in ours.trials:
        costs = loop.costs(trial.configuration, trial.budget)
        away = max(away, *(abs(costs[name] - cost) for name, cost in trial.costs.items()))
    # An answer whose two best tokens are equal but for rounding may fall either way.
    assert away < 1 / SETTINGS[setting][1], away
    return f"costs of {len(ours.trials)} trials equal to {away:.0e}"


@contextmanager
def scoring_timed() -> Iterator[list[float]]:
    """Inside the block, seconds of scoring in this process are appended to the list."""
    seconds: list[float] = []
    original = evaluator.scored

    def timed(*given: Any) -> Any:
        begun = time.perf_counter()
        found = original(*given)
        seconds.append(time.perf_counter() - begun)
        return found

    evaluator.scored = timed
    try:
        yield seconds
    finally:
        evaluator.scored = original


def measured(
    models: Sequence[Path], setting: str, trials: int, num_rounds: int, num_cores: int
) -> dict[str, Any]:
    """One setting, on so many cores."""
    torch.set_num_threads(num_cores)
    rounds = []
    for seed in range(num_rounds):
        ours = search(models, setting, trials, seed, workers=num_cores)
        begun = time.perf_counter()
        with scoring_timed() if num_cores == 1 else nullcontext() as scoring:
            ours.run()
        ours_seconds = time.perf_counter() - begun
        whole, loop_scoring, loop_outside = looped(models, setting, seed, ours.trials)
        found = {
            "trials": len(ours.trials),
            "budgets": dict(Counter(trial.budget for trial in ours.trials)),
            "ours": ours_seconds,
            "loop": whole,
            "loop_scoring": loop_scoring,
            "loop_outside": loop_outside,
            "needed": needed(setting, ours.trials),
        }
        if scoring is not None:
            of_trials = sum(trial.seconds for trial in ours.trials)
            found["outside"] = (of_trials - sum(scoring)) / len(ours.trials)
            found["outside_share"] = 1 - sum(scoring) / of_trials
        rounds.append(found)
        print(f"{setting}, {num_cores} cores: {found}", file=sys.stderr, flush=True)
    ratios = sorted(one["loop"] / one["ours"] for one in rounds)
    return {
        "cores": num_cores,
        "rounds": rounds,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def possible(one_core: dict[str, Any], found: dict[str, Any]) -> float:
    """The most that the ratio of `found` could be."""
    ratios = []
    for alone, here in zip(one_core["rounds"], found["rounds"], strict=True):
        ratios.append(here["loop"] * found["cores"] / (alone["loop_scoring"] * alone["needed"]))
    return statistics.median(ratios)


def asked(optimizer: str, depth: int, trials: int = 500, timed: int = 100) -> float:
    """Seconds of a trial that go into asking for it and telling what came of it, over the last ones of so
    many; costs are drawn.
    """
    space = Space(depth=depth, num_dropped=depth // 4, num_candidates=3, low=0.0, high=1.0, merge=True)
    history, rng = History(), random.Random(0)
    sampler: Any = Evolution(space, history, rng, fresh_only=optimizer != "evolution")
    if optimizer == "optuna":
        sampler = TPE(space, history, sampler, 3, seed=0)
    backend = Racing(sampler, history, starts(space, [], limit=90), (30, 90, 270), rng=rng)
    known: dict[tuple[str, int], Trial] = {}
    seconds, counted = 0.0, 0
    while len(known) < trials:
        before, begun = len(known), time.perf_counter()
        requests = backend.ask()
        took = time.perf_counter() - begun
        for request in requests:
            key = (request.configuration.key, request.budget)
            costs = {str(task): rng.random() for task in range(3)}
            known.setdefault(
                key,
                Trial(id=len(known), configuration=request.configuration, budget=request.budget, costs=costs),
            )
        answers = [known[request.configuration.key, request.budget] for request in requests]
        begun = time.perf_counter()
        backend.tell(answers)
        took += time.perf_counter() - begun
        if before >= trials - timed:
            seconds, counted = seconds + took, counted + len(known) - before
    return seconds / counted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["xs", "s"])
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="the file keeps the others"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tailoring.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    settings: dict[str, Any] = {}
    if options.out.exists() and set(options.settings) < set(SETTINGS):
        kept = json.loads(options.out.read_text())
        if (kept["trials"], kept["num_rounds"]) != (options.trials, options.rounds):
            parser.error(f"{options.out} is of other trials or rounds")
        settings = kept["settings"]
    for size, name in product(options.sizes, options.settings):
        with tempfile.TemporaryDirectory() as folder:
            models = family(Path(folder), size)
            agreement = agree(models, name)
            print(f"{size}, {name}: same result: {agreement}", file=sys.stderr, flush=True)
            by_cores = [
                measured(models, name, options.trials, options.rounds, count)
                for count in sorted({1, cores()})
            ]
        settings[f"{size}, {name}"] = {"agreement": agreement, "by_cores": by_cores}
    torch.set_num_threads(1)
    results = {
        "machine": environment(),
        "trials": options.trials,
        "num_rounds": options.rounds,
        "settings": settings,
        "asks": [
            {"optimizer": optimizer, "layers": depth, "seconds": asked(optimizer, depth)}
            for optimizer, depth in product(("evolution", "optuna"), (8, 32))
        ],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    words = table(results)
    options.out.with_suffix(".md").write_text(words)
    print(words)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Test-bed sizes, base and three fine-tunes, searches of {results['trials']} trials, median of",
        f"{results['num_rounds']} rounds. The loop is a plain formulation of the public code's trial:",
        "combine, write, load, score. `possible`: were all but scoring free, no layer run twice on one",
        "input, and all cores busy all the time.",
        "",
        "| size, setting | cores | trials a minute | loop | ratio | spread | possible | target | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for words, setting in results["settings"].items():
        for found in setting["by_cores"]:
            ours, loop = (
                statistics.median(60 * one["trials"] / one[who] for one in found["rounds"])
                for who in ("ours", "loop")
            )
            low, high = found["ratios"][0], found["ratios"][-1]
            most = possible(setting["by_cores"][0], found)
            lines.append(
                f"| {words} | {found['cores']} | {ours:.0f} | {loop:.0f} "
                f"| {found['ratio']:.1f} | {low:.1f} to {high:.1f} | {most:.1f} "
                f"| {FLOOR:.0f} at least, goal {GOAL:.0f} | {verdict(found['ratio'] >= FLOOR)} |"
            )
    lines += [
        "",
        "| size, setting | a trial outside of scoring | share of it | the loop's | at most | |",
        "|---|---|---|---|---|---|",
    ]
    for words, setting in results["settings"].items():
        rounds = setting["by_cores"][0]["rounds"]
        each, share, loop = (
            statistics.median(one[what] for one in rounds)
            for what in ("outside", "outside_share", "loop_outside")
        )
        lines.append(
            f"| {words} | {1e3 * each:.1f} ms | {share:.1%} "
            f"| {1e3 * loop:.0f} ms | {OVERHEAD:.0%} | {verdict(share <= OVERHEAD)} |"
        )
    lines += [
        "",
        "| optimiser | layers | ask and tell, a trial, at 400 to 500 | at most | |",
        "|---|---|---|---|---|",
    ]
    for one in results["asks"]:
        lines.append(
            f"| {one['optimizer']} | {one['layers']} | {1e3 * one['seconds']:.2f} ms "
            f"| {1e3 * ASK:.0f} ms | {verdict(one['seconds'] <= ASK)} |"
        )
    return "\n".join([*lines, ""])


def verdict(holds: bool) -> str:
    return "holds" if holds else "missed"


if __name__ == "__main__":
    main()
