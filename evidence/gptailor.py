"""GPTailor: does a search over the layers of several fine-tunes give a better small model than a rule, and
than a search over which layers go?

    python evidence/gptailor.py [--seeds 6 7 8] [--work FOLDER] [--trials 300]
    python evidence/gptailor.py --quick     a few steps, to see that everything runs; writes to --out only

Base and three fine-tunes of the test-bed (size s, mild flavour: D_source, D_docs, S_strings), 2 of 8 layers
go. Searches see the calibration pools of source, docs and sort (30 to 270 examples), every number is from the
test pools, those of tables, names, reverse and lookup beside, which no search has seen. Domains count by
retained gain, (uniform - bits) / (uniform - bits of the dense base), skills by exact match.

Arms: the dense models; ShortGPT, angular block, LaCo and SLEB on the base, ShortGPT on the best fine-tune;
removal at random and by search ("LR"), selection without blends ("LS + LR"), all of it ("full"), each with
the same trials; "full" also with Optuna, with SMAC where it is installed, and at random. The removal is
searched on the base and on every fine-tune, so that not only "full" sees fine-tunes; the better by
calibration counts.

Reproduced if, on the mean over seeds: full is at least 5 points of the mean over the seven tasks above
ShortGPT on the best model, and at least 1 point above LR, each in two seeds of three. Weaker claim: full is
above ShortGPT on the best model in two seeds of three. What LS + LR does is reported as it falls.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from script import Units, parser_of, publish, units

from weightsmith.compression import TailorPlan, TailorSearch, angular_block, greedy, laco, shortgpt
from weightsmith.compression.tailoring.scoring import equal_rows, example_order
from weightsmith.compression.tailoring.tasks import calibration_tasks
from weightsmith.evaluation import evaluate, load_model
from weightsmith.runs.environment import environment
from weightsmith.testbed import DOMAINS, fingerprint
from weightsmith.training.bed import bed

FINETUNES = ("D_source", "D_docs", "S_strings")
SEARCHED = ("source", "docs", "sort")
UNSEEN = ("tables", "names", "reverse", "lookup")
TASKS = (*SEARCHED, *UNSEEN)
SPARSITY, OVER_SHORTGPT, OVER_REMOVAL = 0.25, 0.05, 0.01
DEFAULT = "evolution"
OPTIMIZERS = ("optuna", "smac", "random")
BEST, REMOVAL, SELECTION, FULL = "ShortGPT, best model", "LR", "LS + LR", "full"

Scores = dict[str, float]


@dataclass(frozen=True)
class Amount:
    """How much is spent.

    Attributes:
        size: Of the bed's models.
        trials: Of each search.
        budgets: Lowest and highest rung.
        characters: Of each domain that a score reads.
        items: Questions of each skill.
        steps: Of the bed's trainings, in the place of its own.
    """

    size: str = "s"
    trials: int = 300
    budgets: tuple[int, int] = (30, 270)
    characters: int = 20_000
    items: int = 400
    steps: tuple[tuple[str, int], ...] = ()


QUICK = Amount("xs", 6, (2, 6), 1000, 8, (("base_steps", 2), ("finetune_steps", 2)))


class Bench:
    """The models of one seed, and what scores them."""

    def __init__(self, seed: int, amount: Amount, unit: Units) -> None:
        self.seed, self.amount, self.unit = seed, amount, unit
        made = bed(amount.size, seed, "mild", FINETUNES, mixture="all", **dict(amount.steps))
        self.folders = {"base": made.base, **made.finetunes}
        self.models = {name: load_model(folder)[0] for name, folder in self.folders.items()}
        base, self.tokenizer = load_model(made.base)
        given = calibration_tasks(
            SEARCHED, self.tokenizer, base.config.to_dict(), examples=amount.budgets[1], text="retained"
        )
        self.tasks = [task.prepare(base) for task in given]
        orders = {task.name: example_order(task, seed) for task in self.tasks}
        self.batches = equal_rows(
            row for task in self.tasks for row in task.token_rows(orders[task.name][: amount.budgets[1]])
        )
        self.dropped = math.ceil(SPARSITY * base.config.num_hidden_layers)
        self.dense = {split: self.raw(base, split) for split in ("calibration", "test")}

    def raw(self, model: Any, split: str) -> Scores:
        """Bits and exact matches."""
        found = evaluate(
            model,
            list(TASKS),
            split,
            tokenizer=self.tokenizer,
            characters=self.amount.characters,
            items=self.amount.items,
        )
        return {task: score.value for task, score in found.items()}

    def scores(self, model: Any, split: str) -> Scores:
        """Retained gain of domains and exact match of skills, and their mean."""
        return judged(self.raw(model, split), self.dense[split], model.config.vocab_size)

    def arm(self, name: str, make: Callable[[], tuple[Any, Mapping[str, Any]]]) -> dict[str, Any]:
        """The scores of an arm."""

        def scored() -> dict[str, Any]:
            model, facts = make()
            return {**{split: self.scores(model, split) for split in ("calibration", "test")}, **facts}

        return self.unit(f"{self.seed} {name}", scored)

    def search(self, name: str, base: str = "base", **options: Any) -> dict[str, Any]:
        """The arm of a search; `candidates=True` gives it the fine-tunes."""
        low, high = self.amount.budgets
        candidates = list(self.models)[1:] if options.pop("candidates", False) else []

        def make() -> tuple[Any, Mapping[str, Any]]:
            found = TailorSearch(
                self.models[base],
                [self.models[other] for other in candidates],
                tasks=self.tasks,
                sparsity=SPARSITY,
                n_trials=self.amount.trials,
                min_budget=low,
                max_budget=high,
                early_stop=False,  # SMAC has no such thing: every arm scores its trials to their ends
                seed=self.seed,
                work=self.unit.place(f"{self.seed} {name}"),
                **options,
            )
            plan = found.run()
            seconds = sum(trial.seconds for trial in found.trials)
            return plan.build(), {
                "plan": plan.configuration.to_json(),
                "trials": len(found.trials),
                "trial_seconds": seconds,
                "cost": statistics.fmean(plan.costs.values()),
            }

        return self.arm(name, make)

    def rule(self, name: str, rule: Callable[..., Any], model: str = "base") -> dict[str, Any]:
        """The arm of a rule for one model."""

        def make() -> tuple[Any, Mapping[str, Any]]:
            found = rule(self.models[model], self.batches, self.dropped)
            if hasattr(found, "groups"):
                return found.model, {"groups": [list(group) for group in found.groups]}
            plan = TailorPlan.of(found, self.models[model])
            return plan.build(), {"plan": found.to_json()}

        return self.arm(name, make)


def judged(raw: Scores, dense: Scores, vocabulary: int) -> Scores:
    """Retained gain or exact match of each task; `mean` over all, `searched` and `unseen` over their
    parts.
    """
    uniform = math.log2(vocabulary)
    found = {
        task: (uniform - raw[task]) / (uniform - dense[task]) if task in DOMAINS else raw[task]
        for task in TASKS
    }
    parts = {"mean": TASKS, "searched": SEARCHED, "unseen": UNSEEN}
    return found | {part: statistics.fmean(found[task] for task in tasks) for part, tasks in parts.items()}


def measure(seed: int, amount: Amount, unit: Units) -> dict[str, Any]:
    """All arms of one seed."""
    bench = Bench(seed, amount, unit)
    arms: dict[str, Any] = {}
    for name, model in bench.models.items():
        arms[f"dense {name}"] = bench.arm(f"dense {name}", lambda model=model: (model, {}))
    for name, rule in (
        ("ShortGPT", shortgpt),
        ("angular block", angular_block),
        ("SLEB", greedy),
        ("LaCo", laco),
    ):
        arms[f"{name}, base"] = bench.rule(f"{name}, base", rule)
    pruned = {name: bench.rule(f"ShortGPT, {name}", shortgpt, name) for name in bench.models}
    arms[BEST] = best(pruned)
    arms["random removal"] = bench.search("random removal", optimizer="random")
    searched = {name: bench.search(f"LR, {name}", name) for name in bench.models}
    arms["LR, base"], arms[REMOVAL] = searched["base"], best(searched)
    arms[SELECTION] = bench.search(SELECTION, candidates=True, merge_methods=())
    arms[FULL] = bench.search(FULL, candidates=True, optimizer=DEFAULT)
    for optimizer in OPTIMIZERS:
        if optimizer == "random" or find_spec(optimizer) is not None:
            arms[f"full, {optimizer}"] = bench.search(
                f"full, {optimizer}", candidates=True, optimizer=optimizer
            )
    return {"seed": seed, "arms": arms}


def best(arms: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The arm that is best on the calibration pools of the tasks searched on."""
    name = max(arms, key=lambda one: arms[one]["calibration"]["searched"])
    return {**arms[name], "model": name}


def judge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The claims and the verdict."""

    def ahead(name: str) -> list[float]:
        return [run["arms"][FULL]["test"]["mean"] - run["arms"][name]["test"]["mean"] for run in runs]

    most = math.ceil(2 * len(runs) / 3)

    def holds(name: str, by: float) -> bool:
        found = ahead(name)
        return statistics.fmean(found) >= by and sum(value > 0 for value in found) >= most

    claims = {
        f"full {100 * OVER_SHORTGPT:.0f} points above {BEST}": holds(BEST, OVER_SHORTGPT),
        f"full {100 * OVER_REMOVAL:.0f} point above {REMOVAL}": holds(REMOVAL, OVER_REMOVAL),
    }
    weaker = sum(value > 0 for value in ahead(BEST)) >= most
    verdict = "reproduced" if all(claims.values()) else "weaker claim" if weaker else "not shown"
    return {
        "verdict": verdict,
        "claims": claims,
        "ahead": {name: ahead(name) for name in (BEST, REMOVAL, SELECTION)},
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    runs = results["runs"]

    def cell(name: str, part: str, split: str = "test") -> str:
        values = [100 * run["arms"][name][split][part] for run in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}"

    lines = [
        "# GPTailor",
        "",
        f"Test-bed size {results['size']}, {results['trials']} trials of each search, seeds "
        f"{', '.join(str(run['seed']) for run in runs)}; points, mean and spread over seeds.",
        "",
        "| arm | mean of all | of those searched on | of those unseen | calibration, searched on |",
        "|---|---|---|---|---|",
    ]
    for name in runs[0]["arms"]:
        cells = [cell(name, part) for part in ("mean", "searched", "unseen")]
        lines.append(f"| {name} | {' | '.join(cells)} | {cell(name, 'searched', 'calibration')} |")
    lines += [
        "",
        "What each optimiser found for the whole space, in as many trials: the plan's mean cost on the "
        "examples that the search read, by seed, and points on the test pools.",
        "",
        "| optimiser | cost | mean | test, searched on | test, all |",
        "|---|---|---|---|---|",
    ]
    for optimizer in (DEFAULT, *OPTIMIZERS):
        name = FULL if optimizer == DEFAULT else f"{FULL}, {optimizer}"
        if name in runs[0]["arms"]:
            costs = [run["arms"][name]["cost"] for run in runs]
            by_seed = ", ".join(f"{cost:.4f}" for cost in costs)
            lines.append(
                f"| {optimizer} | {by_seed} | {statistics.fmean(costs):.4f} | {cell(name, 'searched')} | "
                f"{cell(name, 'mean')} |"
            )
    lines += ["", "| claim | |", "|---|---|"]
    lines += [f"| {claim} | {'holds' if held else 'fails'} |" for claim, held in results["claims"].items()]
    ahead = "; ".join(
        f"{name}: {', '.join(f'{100 * value:+.1f}' for value in values)}"
        for name, values in results["ahead"].items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Points that full is ahead, by seed: {ahead}.",
            "",
            f"**Verdict: {results['verdict']}.**",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what isn't there yet, judge, write."""
    parser = parser_of(__doc__, "tiny models and six trials", seeds=(6, 7, 8), resumes=True)
    parser.add_argument("--trials", type=int, help="of each search")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    amount = QUICK if chosen.quick else Amount()
    if chosen.trials:
        amount = replace(amount, trials=chosen.trials)
    seeds = chosen.seeds[:1] if chosen.quick else chosen.seeds
    with units("gptailor", chosen, [asdict(amount), fingerprint()]) as unit:
        runs = [measure(seed, amount, unit) for seed in seeds]
    results = {
        "seeds": list(seeds),
        "size": amount.size,
        "trials": amount.trials,
        **judge(runs),
        "runs": runs,
        "machine": environment(),
    }
    publish("gptailor", chosen, results, table(results))


if __name__ == "__main__":
    main()
