"""Mediator on the test-bed of hard fine-tunes: does routing the blocks of most conflict pay, and does the
router know?

Four experts of one base (numbers, strings, lookup, docs; own data only, so that they conflict). A task's
retained score is the score over its own expert's (for text: bits saved against a uniform guess, over those
the expert saves); the mean is over experts. Blocks, strengths and the router see calibration pools only,
numbers are of test pools.

    static      average, TIES, RESM (five strengths each where there is one, the best on calibration)
    Mediator    half of the blocks routed, at that of five densities that is best on calibration and keeps to
                half of the experts' bytes; and at its default density, 0.1
    routed      the n blocks of highest conflict, of lowest, of largest change, of most damage when averaged,
                at random; all blocks sparser, at the bytes of Mediator (dynamic averaging); all blocks in
                full; each expert alone
    router      in charge; with the task tags of its prompts removed; with one route in ten wrong
    unlike      a solved question of one expert before a question of another: blend by p against the likeliest
                alone; alignment forms; text in swapped case

Reproduced if (i) Mediator, its density chosen like the strengths of merges, keeps 5 points more than the
best static merge at half the bytes of all experts or less, (ii) with 2, 3 and 4 routed blocks the highest
conflict is at least as good as random blocks, and 2 points better than the lowest, (iii) on mixed prompts the
blend is at least as good as the likeliest expert alone. If full routing does not beat the average there is no
conflict to resolve, and nothing is claimed.

    python evidence/mediator.py                    writes evidence/results/mediator.json, .md and
                                                   .svg
    python evidence/mediator.py --seeds 0          one seed
    python evidence/mediator.py --quick            a few steps, to see that everything runs; writes to --out
    only
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from script import parser_of, publish, units

from weightsmith.evaluation import evaluate, load_model, prompts
from weightsmith.evaluation.likelihood import answers, start_token
from weightsmith.evaluation.prompting import token_ids
from weightsmith.merging import diagnose, merge
from weightsmith.merging.mediator import (
    Mediator,
    MediatorConfig,
    RouterConfig,
    build_mediator,
    conflict_profile,
)
from weightsmith.merging.mediator.plan import MediatorPlan, by_conflict, split_blocks
from weightsmith.reports.comparison import draw_figures
from weightsmith.runs.environment import environment
from weightsmith.testbed import SKILL_GROUPS, VOCABULARY, fingerprint
from weightsmith.testbed.domains import passages
from weightsmith.testbed.skills import Item, items
from weightsmith.training.bed import bed

FINETUNES = {"numbers": "S_numbers", "strings": "S_strings", "lookup": "S_lookup", "docs": "D_docs"}
OWN = {**SKILL_GROUPS, "docs": ("docs",)}
UNIFORM_BITS = math.log2(len(VOCABULARY))
STRENGTHS = (0.3, 0.5, 0.7, 1.0, 1.3)
DENSITIES = (0.02, 0.05, 0.1, 0.3, 1.0)
FIXED = (2, 3, 4)
GAIN, MARGIN, BYTES, WRONG = 0.05, 0.02, 0.5, 0.1


class Amount(NamedTuple):
    """How much everything reads.

    Attributes:
        items: Test questions of each skill.
        characters: Test characters of text.
        search: Calibration questions, and a tenth of the characters, for choices.
        prompts: Router prompts of each expert.
        draws: Random choices of blocks.
    """

    items: int = 200
    characters: int = 8000
    search: int = 80
    prompts: int = 64
    draws: int = 3


QUICK = Amount(12, 600, 8, 10, 1)


class Bench:
    """One seed's base and experts, and how a model is scored against them."""

    def __init__(self, made: Any, folder: Path, amount: Amount) -> None:
        self.base, self.folder, self.amount = made.base, folder, amount
        self.experts = {task: made.finetunes[name] for task, name in FINETUNES.items()}
        self.tokenizer = load_model(self.base)[1]
        self.reference = {
            split: {
                task: self.raw(load_model(path)[0], OWN[task], split) for task, path in self.experts.items()
            }
            for split in ("calibration", "test")
        }
        self.copies = sum(
            path.stat().st_size for one in self.experts.values() for path in one.glob("*.safetensors")
        )
        self.number = 0

    def raw(self, model: Any, tasks: Sequence[str], split: str) -> dict[str, float]:
        """Score of each task, higher is better."""
        test = split == "test"
        found = evaluate(
            model,
            list(tasks),
            split,
            tokenizer=self.tokenizer,
            items=self.amount.items if test else self.amount.search,
            characters=self.amount.characters if test else max(400, self.amount.characters // 4),
        )
        return {
            name: score.value if score.higher_is_better else UNIFORM_BITS - score.value
            for name, score in found.items()
        }

    def retained(self, model: Any, split: str = "test", *, given: bool = False) -> dict[str, float]:
        """Retained score of each expert's tasks; `given` tells a mediated model whose they are."""
        found = {}
        for task, tasks in OWN.items():
            with model.using(task) if given else nullcontext():
                scored = self.raw(model.model if given else model, tasks, split)
            own = self.reference[split][task]
            found[task] = statistics.fmean(scored[name] / max(own[name], 1e-9) for name in tasks)
        return found

    def mediated(self, plan: MediatorPlan, **options: Any) -> tuple[Mediator, float]:
        """A model with the plan's blocks routed, and its bytes over those of all experts."""
        self.number += 1
        out = self.folder / f"m{self.number}"
        report = build_mediator(self.base, self.experts, out, MediatorConfig(**options), plan=plan)
        return Mediator.from_pretrained(out, mode="materialize"), report.bytes / self.copies

    def dense_enough(self, plan: MediatorPlan, densities: Mapping[float, Mapping[str, Any]]) -> float:
        """The density that keeps most on calibration, of those within the bytes that are allowed."""
        fitting = [density for density, found in densities.items() if found["bytes"] <= BYTES]
        kept = {
            density: self.routed(plan, "calibration", expert_density=density)["mean"] for density in fitting
        }
        return max(kept, key=lambda density: kept[density])

    def routed(self, plan: MediatorPlan, split: str = "test", **options: Any) -> dict[str, Any]:
        """Mean retained score with the task given, and bytes."""
        model, share = self.mediated(plan, **options)
        scores = self.retained(model, split, given=True)
        model.close()
        return {"mean": statistics.fmean(scores.values()), "experts": scores, "bytes": share}


def static(bench: Bench) -> dict[str, Any]:
    """The static merges, their strengths chosen on calibration."""
    page = {"base": str(bench.base), "models": [str(path) for path in bench.experts.values()]}
    grids: dict[str, list[dict[str, Any]]] = {
        "average": [{"method": "linear"}],
        "ties": [{"method": "ties", "lambda": value} for value in STRENGTHS],
        "resm": [{"method": "resm", "alpha": value} for value in STRENGTHS],
    }
    found = {}
    for name, grid in grids.items():
        tried = []
        for number, options in enumerate(grid):
            out = bench.folder / f"{name}-{number}"
            merge({**page, **options}, out)
            model = load_model(out)[0]
            tried.append((statistics.fmean(bench.retained(model, "calibration").values()), number))
        scores = bench.retained(load_model(bench.folder / f"{name}-{max(tried)[1]}")[0])
        found[name] = {
            "mean": statistics.fmean(scores.values()),
            "experts": scores,
            "chosen": grid[max(tried)[1]],
        }
    return found


def rankings(bench: Bench, plan: MediatorPlan, conflict: list[str]) -> dict[str, list[str]]:
    """Orders of blocks, the first to be routed first."""
    names = [block.block for block in plan.blocks]
    measured = diagnose(
        {
            "method": "task_arithmetic",
            "base": str(bench.base),
            "models": list(map(str, bench.experts.values())),
        }
    )
    norms = [sum(layer["relative_norm"]) for layer in measured["layers"] if layer["layer"] is not None]
    damage = {}
    for name in names:
        others = [other for other in names if other != name]
        damage[name] = bench.routed(plan.with_routed(others), "calibration", expert_density=1.0)["mean"]
    return {
        "highest": conflict,
        "lowest": conflict[::-1],
        "norm": [name for _, name in sorted(zip(norms, names, strict=True), reverse=True)],
        "damage": sorted(names, key=lambda name: damage[name]),
    }


def equal_bytes_density(bench: Bench, plan: MediatorPlan, share: float) -> float:
    """The density at which all blocks routed take no more bytes than `share`."""
    every = plan.with_routed([block.block for block in plan.blocks])
    for density in (0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01):
        model, taken = bench.mediated(every, expert_density=density)
        model.close()
        if taken <= share:
            return density
    return 0.005


def router_arms(bench: Bench, plan: MediatorPlan, seed: int) -> dict[str, Any]:
    """The router in charge, and prompts that it was not made for."""
    model, _ = bench.mediated(plan)
    learnt = {task: prompts(tasks, bench.tokenizer, bench.amount.prompts) for task, tasks in OWN.items()}
    router = model.fit_router(learnt, seed=seed)
    in_charge = bench.retained(model)
    rng = random.Random(seed)
    wrong = {
        task: (1 - WRONG) * value + WRONG * mistaken(bench, model, task, rng)
        for task, value in bench.retained(model, given=True).items()
    }
    return {
        "accuracy": router.report["accuracy"],
        "in_charge": in_charge,
        "mean": statistics.fmean(in_charge.values()),
        "one_in_ten_wrong": statistics.fmean(wrong.values()),
        "no_tags": without_tags(bench, model),
        "mixed": mixed_prompts(bench, model, rng),
        "unlike": unlike(bench, model),
    }


def mistaken(bench: Bench, model: Mediator, task: str, rng: random.Random) -> float:
    """Retained score of a task's questions when another expert answers."""
    other = rng.choice([name for name in FINETUNES if name != task])
    with model.using(other):
        scored = bench.raw(model.model, OWN[task], "test")
    own = bench.reference["test"][task]
    return statistics.fmean(scored[name] / max(own[name], 1e-9) for name in OWN[task])


def exact(bench: Bench, model: Mediator, asked: Sequence[Item], weights: Sequence[Sequence[float]]) -> float:
    """Share of questions answered exactly, each under its own weights of the experts."""
    start, end = start_token(bench.tokenizer), bench.tokenizer.eos_token_id
    pairs = [
        ([start, *token_ids(bench.tokenizer, item.question)], [*token_ids(bench.tokenizer, item.answer), end])
        for item in asked
    ]
    # Scoring goes through questions in order of their length: in that order they stay where they are.
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    right = 0
    for at in range(0, len(order), 16):
        rows = order[at : at + 16]
        mixes = [dict(zip(model.tasks, map(float, weights[row]), strict=True)) for row in rows]
        with model.using(mixes):
            found = answers(model.model, [pairs[row] for row in rows], batch_size=16)
            right += sum(answer.is_greedy for batch in found for _, answer in batch)
    return right / len(order)


def without_tags(bench: Bench, model: Mediator) -> dict[str, float]:
    """Questions that look alike once the tag is gone: the router sees them without, the model with it."""
    start, hits, score, count = start_token(bench.tokenizer), 0, 0.0, 0
    for skill, owner in (("maximum", "numbers"), ("count", "numbers"), ("sort", "strings")):
        asked = items(skill, "test", bench.amount.items)
        bare = [[start, *token_ids(bench.tokenizer, item.question[1:])] for item in asked]
        decisions = [
            decision for at in range(0, len(bare), 16) for decision in model.route(bare[at : at + 16])
        ]
        hits += sum(decision.task == owner for decision in decisions)
        score += len(asked) * exact(bench, model, asked, [decision.weights for decision in decisions])
        count += len(asked)
    return {"accuracy": hits / count, "exact": score / count}


def mixed_prompts(bench: Bench, model: Mediator, rng: random.Random) -> dict[str, float]:
    """A solved question of one expert, then one of another; under a blend by p and under the likeliest
    alone.
    """
    pairs = [(a, b) for a in SKILL_GROUPS for b in SKILL_GROUPS if a != b]
    asked = []
    for first, second in pairs:
        count = max(2, bench.amount.items // len(pairs))
        solved = items(rng.choice(SKILL_GROUPS[first]), "test", count)
        open_ = items(rng.choice(SKILL_GROUPS[second]), "test", count)
        asked += [
            Item(f"{a.question}{a.answer}\n{b.question}", b.answer)
            for a, b in zip(solved, open_, strict=True)
        ]
    start = start_token(bench.tokenizer)
    ids = [[start, *token_ids(bench.tokenizer, item.question)] for item in asked]
    fitted = model.router
    assert fitted is not None
    # Every prompt is blended by p, however sure the router is and however strange the prompt.
    always = dataclasses.replace(fitted.config, u_lo=0.0, ood="p")
    model.router = dataclasses.replace(fitted, config=always)
    blends = [decision for at in range(0, len(ids), 16) for decision in model.route(ids[at : at + 16])]
    model.router = fitted
    usual = [decision for at in range(0, len(ids), 16) for decision in model.route(ids[at : at + 16])]
    best = [[float(task == decision.task) for task in model.tasks] for decision in blends]
    return {
        "blend": exact(bench, model, asked, [decision.weights for decision in blends]),
        "top1": exact(bench, model, asked, best),
        "blended": statistics.fmean(max(decision.weights) < 1 for decision in blends),
        "as_configured": exact(bench, model, asked, [decision.weights for decision in usual]),
        "uncertainty": statistics.fmean(decision.uncertainty for decision in usual),
        "ood": statistics.fmean(decision.ood for decision in usual),
    }


def unlike(bench: Bench, model: Mediator) -> dict[str, dict[str, float]]:
    """What the router says of prompts that no expert was made for."""
    start = start_token(bench.tokenizer)
    texts = {
        "alignment": [
            item.question
            for form in ("honest", "harmless")
            for item in items(form, "test", bench.amount.items // 2)
        ],
        "swapped case": [
            text[at : at + 47].swapcase()
            for text in passages("source", "test", bench.amount.characters)
            for at in range(0, len(text) - 47, 200)
        ],
    }
    found = {}
    for name, listed in texts.items():
        ids = [[start, *token_ids(bench.tokenizer, text)] for text in listed]
        decisions = [decision for at in range(0, len(ids), 16) for decision in model.route(ids[at : at + 16])]
        found[name] = {
            "ood": statistics.fmean(decision.ood for decision in decisions),
            "single": statistics.fmean(decision.branch == "single" for decision in decisions),
            "uncertainty": statistics.fmean(decision.uncertainty for decision in decisions),
        }
    return found


def measure(seed: int, size: str, amount: Amount, **options: Any) -> dict[str, Any]:
    """Everything for one seed."""
    made = bed(size, seed, "hard", list(FINETUNES.values()), mixture="all", **options)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(made, Path(folder), amount)
        profile = conflict_profile(bench.base, bench.experts)
        plan = split_blocks(profile, MediatorConfig())
        names = [block.block for block in plan.blocks]
        half, conflict = len(names) // 2, by_conflict(profile)
        chosen = plan.with_routed(conflict[:half])
        every = plan.with_routed(names)
        mediator = bench.routed(chosen)
        orders = rankings(bench, plan, conflict)
        rng = random.Random(seed)
        fixed: dict[str, dict[str, float]] = {}
        for count in [number for number in FIXED if number < len(names)]:
            row = {
                arm: bench.routed(plan.with_routed(order[:count]), expert_density=1.0)["mean"]
                for arm, order in orders.items()
            }
            draws = [
                bench.routed(plan.with_routed(rng.sample(names, count)), expert_density=1.0)["mean"]
                for _ in range(amount.draws)
            ]
            fixed[str(count)] = {**row, "random": statistics.fmean(draws)}
        density = equal_bytes_density(bench, plan, mediator["bytes"])
        densities = {value: bench.routed(chosen, expert_density=value) for value in DENSITIES}
        dense = bench.dense_enough(chosen, densities)
        return {
            "conflict": [block.conflict for block in profile.blocks],
            "overlap": [block.overlap for block in profile.blocks],
            "routed": [names.index(name) for name in chosen.routed],
            "static": static(bench),
            "mediator": mediator,
            "chosen": {**densities[dense], "density": dense},
            "dynamic_averaging": {**bench.routed(every, expert_density=density), "density": density},
            "full_routing": bench.routed(every, expert_density=1.0),
            "densities": {str(value): found for value, found in densities.items()},
            "shares": {
                str(count): bench.routed(plan.with_routed(conflict[:count]))
                for count in range(1, len(names) + 1)
            },
            "fixed": fixed,
            "router": router_arms(bench, chosen, seed),
        }


# ---- judgement


def mean_of(runs: Sequence[Mapping[str, Any]], *keys: str) -> float:
    found = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value[key]
        found.append(float(value))
    return statistics.fmean(found)


def judge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was asked for, one by one."""
    best = max(mean_of(runs, "static", name, "mean") for name in runs[0]["static"])
    conflict = mean_of(runs, "full_routing", "mean") > mean_of(runs, "static", "average", "mean")
    checks = {
        "there is conflict: full routing beats the average": conflict,
        f"Mediator keeps {100 * GAIN:.0f} points more than the best static merge": mean_of(
            runs, "chosen", "mean"
        )
        >= best + GAIN,
        f"at {100 * BYTES:.0f} % of the experts' bytes or less": mean_of(runs, "chosen", "bytes") <= BYTES,
    }
    counts = list(runs[0]["fixed"])
    for count in counts:
        highest = mean_of(runs, "fixed", count, "highest")
        checks[f"{count} blocks: highest conflict at least as good as random"] = highest >= mean_of(
            runs, "fixed", count, "random"
        )
        checks[f"{count} blocks: highest conflict {100 * MARGIN:.0f} points above lowest"] = highest >= (
            mean_of(runs, "fixed", count, "lowest") + MARGIN
        )
    checks["mixed prompts: blend at least as good as the likeliest alone"] = mean_of(
        runs, "router", "mixed", "blend"
    ) >= mean_of(runs, "router", "mixed", "top1")
    core = list(checks.values())[:3]
    verdict = "not shown"
    if all(checks.values()):
        verdict = "reproduced"
    elif all(core):
        verdict = "weaker claim"
    return {"checks": checks, "verdict": verdict}


def spread(runs: Sequence[Mapping[str, Any]], *keys: str) -> str:
    """Mean and range over seeds, in points."""
    values = [100 * mean_of([run], *keys) for run in runs]
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} .. {max(values):.1f})"


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    runs, checks = results["runs"], results["judgement"]["checks"]
    lines = [
        "# Mediator: routing the blocks that conflict",
        "",
        f"Size {results['size']}, seeds {', '.join(map(str, results['seeds']))}, hard flavour, test pools; "
        "retained score in points, mean (range) over seeds; the expert is told, but for the router's rows. "
        f"Made by `python evidence/mediator.py` in {results['seconds'] / 60:.0f} minutes.",
        "",
        "| | retained | bytes of all experts |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {spread(runs, 'static', name, 'mean')} | 25 % |" for name in runs[0]["static"]]
    densities = ", ".join(f"{run['chosen']['density']:g}" for run in runs)
    for key, label in (
        ("chosen", f"**Mediator**, half of the blocks, density {densities}"),
        ("mediator", "Mediator, density 0.1"),
        ("dynamic_averaging", "dynamic averaging over all blocks, equal bytes"),
        ("full_routing", "all blocks in full"),
    ):
        lines.append(f"| {label} | {spread(runs, key, 'mean')} | {100 * mean_of(runs, key, 'bytes'):.0f} % |")
    lines.append(f"| Mediator, density 0.1, router in charge | {spread(runs, 'router', 'mean')} | |")
    lines.append(
        f"| Mediator, density 0.1, one route in ten wrong | {spread(runs, 'router', 'one_in_ten_wrong')} | |"
    )
    lines += ["", "Conflict d of each block, seed by seed (routed ones marked):", ""]
    for seed, run in zip(results["seeds"], runs, strict=True):
        marked = [
            f"**{value:.3f}**" if index in run["routed"] else f"{value:.3f}"
            for index, value in enumerate(run["conflict"])
        ]
        lines.append(f"- seed {seed}: {' '.join(marked)}")
    arms = list(next(iter(runs[0]["fixed"].values())))
    lines += ["", f"| blocks routed in full | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for count in runs[0]["fixed"]:
        lines.append(f"| {count} | {' | '.join(spread(runs, 'fixed', count, arm) for arm in arms)} |")
    for key, label in (("densities", "density"), ("shares", "blocks routed")):
        lines += ["", f"| {label} | retained | bytes |", "|---|---|---|"]
        for value in runs[0][key]:
            taken = 100 * mean_of(runs, key, value, "bytes")
            lines.append(f"| {value} | {spread(runs, key, value, 'mean')} | {taken:.0f} % |")
    lines += ["", "| router | |", "|---|---|"]
    for keys, label in (
        (("accuracy",), "accuracy on held-out prompts"),
        (("no_tags", "accuracy"), "accuracy, tags removed"),
        (("no_tags", "exact"), "exact match, tags removed from what it sees"),
        (("mixed", "blended"), "mixed prompts that a blend by p gives to more than one expert"),
        (("mixed", "blend"), "mixed prompts, blend by p"),
        (("mixed", "top1"), "mixed prompts, likeliest alone"),
        (("mixed", "as_configured"), "mixed prompts, as configured"),
        (("mixed", "ood"), "mixed prompts called unlike"),
        (("unlike", "alignment", "ood"), "alignment forms called unlike"),
        (("unlike", "swapped case", "ood"), "swapped case called unlike"),
    ):
        lines.append(f"| {label} | {spread(runs, 'router', *keys)} |")
    lines += ["", "| asked for | |", "|---|---|"]
    lines += [f"| {name} | {'holds' if held else 'does not hold'} |" for name, held in checks.items()]
    lines += ["", f"**Verdict: {results['verdict']}.**", ""]
    return "\n".join(lines)


def figures(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the report page draws: retained score by expert, and against bytes."""
    static = {name: ("static", name) for name in runs[0]["static"]}
    routed = {
        "Mediator": ("chosen",),
        "Mediator, density 0.1": ("mediator",),
        "dynamic averaging": ("dynamic_averaging",),
        "all blocks in full": ("full_routing",),
    }

    def at(run: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any]:
        for key in keys:
            run = run[key]
        return run

    arms = {**static, **routed}
    rows = [
        {
            "name": name,
            "group": "static merge" if name in static else "routed",
            "values": [
                *([at(run, keys)["experts"][task] for run in runs] for task in FINETUNES),
                [at(run, keys)["mean"] for run in runs],
            ],
        }
        for name, keys in arms.items()
    ]
    copies = 1 / len(FINETUNES)  # of the experts' bytes: a static merge is one model
    points = [
        {
            "name": name,
            "group": "static merge" if name in static else "routed",
            "x": copies if name in static else mean_of(runs, *keys, "bytes"),
            "y": mean_of(runs, *keys, "mean"),
        }
        for name, keys in arms.items()
    ]
    return [
        {
            "kind": "dots",
            "title": "Retained score",
            "axes": [*FINETUNES, "mean"],
            "order": "mean",
            "rows": rows,
        },
        {
            "kind": "scatter",
            "title": "What is kept for how many bytes",
            "x": "bytes of all experts",
            "y": "retained score",
            "points": points,
        },
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, judge, write."""
    parser = parser_of(__doc__, "one seed, a few steps", seeds=(6, 7, 8), resumes=True)
    parser.add_argument("--size", default="s")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, size, amount = (
        (chosen.seeds[:1], "xs", QUICK) if chosen.quick else (chosen.seeds, chosen.size, Amount())
    )
    with units("mediator", chosen, [size, amount, STRENGTHS, DENSITIES, BYTES, fingerprint()]) as done:
        few = {"cache": done.folder / "bed", "base_steps": 4, "finetune_steps": 4} if chosen.quick else {}
        runs = [done(f"seed {seed}", lambda seed=seed: measure(seed, size, amount, **few)) for seed in seeds]
    judgement = judge(runs)
    results = {
        "size": size,
        "seeds": seeds,
        "seconds": sum(run["seconds"] for run in runs),
        "environment": environment(),
        "router": dataclasses.asdict(RouterConfig()),
        "runs": runs,
        "judgement": judgement,
        "verdict": judgement["verdict"],
        "figures": figures(runs),
    }
    publish("mediator", chosen, results, table(results), draw_figures(results["figures"]))


if __name__ == "__main__":
    main()
