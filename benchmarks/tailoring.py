"""Trials per minute of a search for a tailored model, against a loop that writes and loads every candidate.

    python benchmarks/tailoring.py [--trials 300] [--rounds 3] [--size s] [--out
    benchmarks/results/tailoring.json]

A base and three fine-tunes of a test-bed size, weights random: what is timed does not depend on them. Ours is
a whole search, models loaded from their folders. The loop treats every tenth of that search's trials, evenly
from each budget, as the public code does: read the tensors of all sources, combine them, write a checkpoint,
load it, score all examples of the budget; its minutes are those of the others, too, by budget. Scorer and
examples are the same; first the costs of both are checked to be the same.

Two settings: two texts and a skill at budgets 30 to 270, as in our evidence, where a trial is almost all
forward passes, and three skills at 9 to 81, whose prompts are short. Each on one core, and on all cores: ours
with a worker on each, the loop with torch's threads. Beside the ratio of trials a minute stands what a trial
costs outside of scoring, which is what the pool is for: on a CPU, forward passes over some hundred tokens
take as long as writing and reading the weights, so with thousands of them no search can be much faster than
its passes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring.evaluator import Evaluator
from weightsmith.compression.tailoring.scoring import example_order
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.compression.tailoring.tasks import calibration_tasks
from weightsmith.compression.tailoring.trials import Trial
from weightsmith.runs.environment import cores, environment
from weightsmith.testbed import write_model_folder

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "text": (("source", "docs", "sort"), 30, 270),
    "skills": (("sort", "maximum", "count"), 9, 81),
}
"""Tasks, lowest and highest budget."""
FLOOR, GOAL, OVERHEAD = 5.0, 8.0, 0.05
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


def looped(models: Sequence[Path], setting: str, seed: int, trials: Sequence[Trial]) -> tuple[float, float]:
    """Seconds of the loop over the trials of a search, and those of one trial outside of scoring."""
    loop = Loop(models, setting, seed)
    whole, timed, begun = 0.0, 0, time.perf_counter()
    for budget in sorted({trial.budget for trial in trials}):
        rung = [trial for trial in trials if trial.budget == budget]
        chosen = rung[::SAMPLED]
        started = time.perf_counter()
        for trial in chosen:
            loop.costs(trial.configuration, trial.budget)
        whole += (time.perf_counter() - started) * len(rung) / len(chosen)
        timed += len(chosen)
    return whole, (time.perf_counter() - begun - loop.scoring) / timed


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


def outside(models: Sequence[Path], setting: str, trials: int, seed: int) -> tuple[float, float]:
    """Seconds of a trial of ours outside of scoring, and their share of it."""
    scoring = 0.0
    original = Evaluator.__call__

    def scored(task: Any, model: Any, indices: Any) -> Any:
        nonlocal scoring
        begun = time.perf_counter()
        found = task.score(model, indices)
        scoring += time.perf_counter() - begun
        return found

    def timed(self: Evaluator, *job: Any) -> Any:
        tasks, self.tasks = self.tasks, tuple(_Timed(task, scored) for task in self.tasks)
        try:
            return original(self, *job)
        finally:
            self.tasks = tasks

    Evaluator.__call__ = timed  # type: ignore[method-assign]
    try:
        one = search(models, setting, trials, seed)
        one.run()
    finally:
        Evaluator.__call__ = original  # type: ignore[method-assign]
    whole = sum(trial.seconds for trial in one.trials)
    return (whole - scoring) / len(one.trials), 1 - scoring / whole


class _Timed:
    """A task whose scoring is timed."""

    def __init__(self, task: Any, scored: Any) -> None:
        self._task, self._scored, self.name = task, scored, task.name

    def score(self, model: Any, indices: Any) -> Any:
        """As the task does it."""
        return self._scored(self._task, model, indices)


def measured(
    models: Sequence[Path], setting: str, trials: int, num_rounds: int, num_cores: int
) -> dict[str, Any]:
    """One setting, on so many cores."""
    torch.set_num_threads(num_cores)
    rounds = []
    for seed in range(num_rounds):
        ours = search(models, setting, trials, seed, workers=num_cores)
        begun = time.perf_counter()
        ours.run()
        ours_seconds = time.perf_counter() - begun
        whole, loop_outside = looped(models, setting, seed, ours.trials)
        rounds.append(
            {
                "trials": len(ours.trials),
                "budgets": dict(Counter(trial.budget for trial in ours.trials)),
                "ours": ours_seconds,
                "loop": whole,
                "loop_outside": loop_outside,
            }
        )
        print(f"{setting}, {num_cores} cores: {rounds[-1]}", file=sys.stderr, flush=True)
    ratios = sorted(one["loop"] / one["ours"] for one in rounds)
    return {"cores": num_cores, "rounds": rounds, "ratio": statistics.median(ratios), "ratios": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="s")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tailoring.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = family(Path(folder), options.size)
        for name in SETTINGS:
            agreement = agree(models, name)
            print(f"{name}: same result: {agreement}", file=sys.stderr, flush=True)
            per_trial, share = outside(models, name, options.trials, seed=options.rounds)
            settings[name] = {
                "agreement": agreement,
                "outside_seconds": per_trial,
                "outside_share": share,
                "by_cores": [
                    measured(models, name, options.trials, options.rounds, count)
                    for count in sorted({1, cores()})
                ],
            }
    results = {
        "machine": environment(),
        "size": options.size,
        "trials": options.trials,
        "num_rounds": options.rounds,
        "settings": settings,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    words = table(results)
    options.out.with_suffix(".md").write_text(words)
    print(words)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"Test-bed size {results['size']}, base and three fine-tunes, searches of {results['trials']}",
        f"trials, median of {results['num_rounds']} rounds. The loop is a plain formulation of the public",
        "code's trial: combine, write, load, score.",
        "",
        "| setting | cores | trials a minute | loop | ratio | spread | target | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, setting in results["settings"].items():
        for found in setting["by_cores"]:
            ours, loop = (
                statistics.median(60 * one["trials"] / one[who] for one in found["rounds"])
                for who in ("ours", "loop")
            )
            low, high = found["ratios"][0], found["ratios"][-1]
            held = "holds" if found["ratio"] >= FLOOR else "missed"
            lines.append(
                f"| {name} | {found['cores']} | {ours:.0f} | {loop:.0f} | {found['ratio']:.1f} "
                f"| {low:.1f} to {high:.1f} | {FLOOR:.0f} at least, goal {GOAL:.0f} | {held} |"
            )
    lines += [
        "",
        "| setting | a trial outside of scoring | share of it | the loop's | at most | |",
        "|---|---|---|---|---|---|",
    ]
    for name, setting in results["settings"].items():
        alone = [one["loop_outside"] for one in setting["by_cores"][0]["rounds"]]
        held = "holds" if setting["outside_share"] <= OVERHEAD else "missed"
        lines.append(
            f"| {name} | {1e3 * setting['outside_seconds']:.1f} ms | {setting['outside_share']:.1%} "
            f"| {1e3 * statistics.median(alone):.0f} ms | {OVERHEAD:.0%} | {held} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
