"""MaskPro learns better 2:4 masks than it began with, by forward passes alone; where groups are few.

Three problems, all pruned to 2:4, the test split never looked at before the end:

    digits       an MLP 64-64-64-10 on 8 x 8 digits, 2,208 groups, five seeds
    projection   one 128 x 128 projection of the test-bed's base of size s, 4,096 groups, three seeds
    model        all linear layers of that base, some 330,000 groups: reported as it falls, no criterion

Arms: dense, magnitude, Wanda, RIA, SparseGPT (its mask alone, and with its update), SparseSwaps, MaskPro from
magnitude and from Wanda, on digits and model also from SparseSwaps and with `certainty: 3`, all with as many
steps, at the rate that `lr: auto` gives on the first. Ablations on the digits: the residual without tracker,
the tracker without residual, the plain loss, the published scale of 10, and all of these but the scale on
small batches of 16.

What might move masks of 10^5 groups, on the whole model, from Wanda: four masks a step in a quarter of the
steps; and an error in place of the loss, that of each matrix's outputs on the layer's inputs, or of each of
its rows, so that a group's noise comes from its own matrix or row alone. The step is MaskPro's in all.

Reproduced if on the digits, in test loss, MaskPro from magnitude makes good at least 40 % of what magnitude
lost for at least four of five seeds, and its mean is below those of the residual without tracker and of the
plain loss at the same rate. One of the two alone is the weaker claim.

    python evidence/maskpro.py            writes evidence/results/maskpro.json, maskpro.md and maskpro.svg
    python evidence/maskpro.py --quick    a few steps, to see that everything runs; writes to --out only
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plots import page
from script import Units, parser_of, publish, units
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightsmith.compression import (
    MagnitudeOptions,
    MaskProConfig,
    MaskProPruner,
    RIAOptions,
    SparseGPTOptions,
    SparseSwapsOptions,
    WandaOptions,
    prune_,
)
from weightsmith.compression.nm import nm_mask, nm_score, sample_nm, wanda_scores
from weightsmith.compression.nm.calibrate import InputStatistics, calibrate
from weightsmith.compression.nm.targets import Target, find_targets
from weightsmith.reports.drawing import Scale, dot, line, number, text, ticks
from weightsmith.runs.environment import environment
from weightsmith.testbed import DOMAINS
from weightsmith.testbed import text as domain_text
from weightsmith.testbed.alphabet import encode
from weightsmith.training.bed import bed

DIGITS = Path(__file__).parent / "data" / "digits.npz"
LAYER = 3
ONE_SHOT: dict[str, Any] = {
    "magnitude": MagnitudeOptions,
    "Wanda": WandaOptions,
    "RIA": RIAOptions,
    "SparseGPT, mask only": lambda **more: SparseGPTOptions(update=False, **more),
    "SparseGPT, updated": SparseGPTOptions,
    "SparseSwaps": SparseSwapsOptions,
}
MAIN = "MaskPro from magnitude"
STARTS: dict[str, dict[str, Any]] = {MAIN: {}, "MaskPro from Wanda": {"init": "wanda"}}
FURTHER: dict[str, dict[str, Any]] = {
    "MaskPro from SparseSwaps": {"init": "sparseswaps"},
    "MaskPro from magnitude, certainty 3": {"certainty": 3.0},
}
MANY = 4
CREDITS = {"error of matrices": False, "error of rows": True}
ABLATIONS: dict[str, dict[str, Any]] = {
    "residual, no tracker": {"estimator": "residual"},
    "tracker, no residual": {"estimator": "baseline"},
    "plain loss": {"estimator": "loss"},
}
PUBLISHED_SCALE = "MaskPro, C = 10"


@dataclass(frozen=True)
class Amount:
    """How much of everything.

    Attributes:
        train_steps: Of the digits' dense model.
        steps: Of MaskPro on the digits.
        layer_steps: Of MaskPro on one projection.
        model_steps: Of MaskPro on the whole model.
        credit_steps: On each matrix, by errors of outputs.
        batch: Rows of text in a batch; there are 16 batches.
        rows: Rows of text of the test split.
        size: Of the bed.
        base_steps: Of the bed's base; None takes the bed's own.
    """

    train_steps: int = 1500
    steps: int = 6000
    layer_steps: int = 20_000
    model_steps: int = 3000
    credit_steps: int = 1000
    batch: int = 8
    rows: int = 512
    size: str = "s"
    base_steps: int | None = None


QUICK = Amount(
    train_steps=60,
    steps=230,
    layer_steps=210,
    model_steps=210,
    credit_steps=20,
    batch=2,
    rows=8,
    size="xs",
    base_steps=2,
)


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """1,200 rows to train and calibrate on, 597 to test on."""
    with np.load(DIGITS) as stored:
        pixels = torch.from_numpy(stored["pixels"].astype(np.float32) / 16)
        labels = torch.from_numpy(stored["labels"].astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return {
        "train": (pixels[order[:1200]], labels[order[:1200]]),
        "test": (pixels[order[1200:]], labels[order[1200:]]),
    }


def dense_digits(seed: int, steps: int, rows: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        places = torch.randint(0, len(rows[1]), (64,), generator=draws)
        optimizer.zero_grad()
        cross_entropy(model(rows[0][places]), rows[1][places]).backward()
        optimizer.step()
    return model.eval()


def digits_loss(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Problem:
    """A dense model and what it is pruned and judged by.

    Attributes:
        model: Dense, in eval mode; copied for each arm.
        batches: Calibration data.
        loss: Of a model on a batch.
        judge: From a model to its scores on the test split.
        choice: Which layers.
        steps: Of MaskPro.
    """

    model: nn.Module
    batches: list[Any]
    loss: Callable[[nn.Module, Any], Any]
    judge: Callable[[nn.Module], dict[str, float]]
    choice: dict[str, Any]
    steps: int


def one_shot(problem: Problem, name: str) -> dict[str, Any]:
    model = copy.deepcopy(problem.model)
    prune_(model, problem.batches, ONE_SHOT[name](**problem.choice), run=problem.loss)
    return problem.judge(model)


def learnt(
    problem: Problem, rate: float, batches: Sequence[Any] | None = None, **options: Any
) -> dict[str, Any]:
    """A run of MaskPro, judged by the mask that it learnt, better than the first one or not."""
    model = copy.deepcopy(problem.model)
    config = MaskProConfig(
        **(
            {"init": "magnitude", "init_scale": "auto", "lr": rate, "steps": problem.steps, "keep": "learnt"}
            | problem.choice
            | options
        )
    )
    pruner = MaskProPruner(model, config, loss_fn=problem.loss)
    report = pruner.fit(batches or problem.batches)
    pruner.apply_()
    return {
        **problem.judge(model),
        "changed": report.changed,
        "groups": report.groups,
        "first_loss": report.first_loss,
        "final_loss": report.final_loss,
        "scale": report.init_scale,
        "refreshed": list(report.refreshed),
        "skipped": len(report.skipped),
        "losses": [round(value, 5) for value in means(report.losses, 60)],
    }


def credited(problem: Problem, rows: bool, steps: int) -> dict[str, Any]:
    """MaskPro's step on one matrix after another, from Wanda, by the error that a mask causes in its outputs:
    of all rows together, or of each row for itself.
    """
    model = copy.deepcopy(problem.model)
    changed = groups = 0

    def learn(target: Target, seen: InputStatistics) -> None:
        nonlocal changed, groups
        weight, squares = target.parameter.data, seen.squares / seen.rows
        first = nm_mask(wanda_scores(weight, seen.norms))
        mask = _learn_by_errors(weight, squares, first, rows, steps)
        moved = (mask != first).unflatten(1, (-1, 4)).any(-1)
        changed, groups = changed + int(moved.sum()), groups + moved.numel()
        weight.mul_(mask)

    calibrate(model, find_targets(model, WandaOptions()), problem.batches, "hessian", learn, run=problem.loss)
    return {**problem.judge(model), "changed": changed / groups, "groups": groups}


def _learn_by_errors(weight: Tensor, squares: Tensor, first: Tensor, rows: bool, steps: int) -> Tensor:
    """The mask after `steps`, of a matrix (O, I) with second moments of its inputs (I, I)."""
    config = MaskProConfig(init_scale="auto")
    scale = config.scale_for(first.numel() // 4 // (len(first) if rows else 1))
    logits = (first * scale).unflatten(1, (-1, 4))

    def error(mask: Tensor) -> Tensor:
        gone = weight * ~mask
        each = ((gone @ squares) * gone).sum(1)
        return each if rows else each.sum().expand(len(each))

    reference = error(first)
    tries = [sample_nm(logits, 2, seed=1, step=step).flatten(1) for step in range(50)]
    measured = torch.stack([error(mask) - reference for mask in tries])
    rate = 0.1 / measured.std(0).clamp_min(1e-30)
    tracker = measured.mean(0)
    for step in range(steps):
        drawn = sample_nm(logits, 2, step=step)
        residual = error(drawn.flatten(1)) - reference
        logits -= (rate * (residual - tracker))[:, None, None] * nm_score(logits, drawn)
        logits.clamp_(-40, 40)
        tracker = config.alpha * tracker + (1 - config.alpha) * residual
    return nm_mask(logits.flatten(1))


def rate_of(problem: Problem, **options: Any) -> dict[str, float]:
    """The rate that `lr: auto` gives."""
    config = MaskProConfig(
        **({"init": "magnitude", "init_scale": "auto", "lr": "auto", "steps": 201} | problem.choice | options)
    )
    return {
        "rate": MaskProPruner(copy.deepcopy(problem.model), config, loss_fn=problem.loss)
        .fit(problem.batches)
        .lr
    }


def means(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` parts of a list."""
    edges = np.linspace(0, len(values), min(count, len(values)) + 1).astype(int)
    return [statistics.fmean(values[a:b]) for a, b in pairwise(edges)]


def digits_problem(seed: int, amount: Amount) -> tuple[Problem, list[Any]]:
    """The problem, and its calibration data in small batches."""
    data = digits(seed)
    x, y = data["train"]
    model = dense_digits(seed, amount.train_steps, data["train"])

    @torch.no_grad()
    def judge(pruned: nn.Module) -> dict[str, float]:
        logits = pruned(data["test"][0])
        right = (logits.argmax(-1) == data["test"][1]).float().mean()
        return {"test": float(cross_entropy(logits, data["test"][1])), "accuracy": float(right)}

    def cut(size: int, count: int) -> list[Any]:
        return [(x[at : at + size], y[at : at + size]) for at in range(0, size * count, size)]

    problem = Problem(model, cut(256, 4), digits_loss, judge, {}, amount.steps)
    return problem, cut(16, 64)


def text_rows(split: str, count: int, length: int = 96) -> Tensor:
    """Rows of characters, evenly from all domains."""
    rows = []
    for domain in DOMAINS:
        data = torch.from_numpy(encode(domain_text(domain, split)).astype(np.int64))
        starts = torch.linspace(0, len(data) - length, max(1, count // len(DOMAINS))).long()
        rows.append(data[starts[:, None] + torch.arange(length)])
    return torch.cat(rows)


def language_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch, use_cache=False).loss


def language_problem(seed: int, amount: Amount, one_layer: bool, cache: Path | None) -> Problem:
    from transformers import AutoModelForCausalLM

    more = {} if amount.base_steps is None else {"base_steps": amount.base_steps}
    made = bed(amount.size, seed, which=[], cache=cache, **more)
    model = AutoModelForCausalLM.from_pretrained(made.base).eval()
    rows = text_rows("train", 16 * amount.batch)
    mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    batches = [{"input_ids": part, "labels": part} for part in mixed.split(amount.batch)]
    held = [{"input_ids": part, "labels": part} for part in text_rows("test", amount.rows).split(64)]
    choice, steps = {}, amount.model_steps
    if one_layer:
        # No mask changes what comes before the layer: it is computed once.
        batches, held = ([_from_layer(model, batch) for batch in some] for some in (batches, held))
        for number in range(LAYER):
            model.model.layers[number] = Nothing().eval()
        choice, steps = {"targets": (f"model.layers.{LAYER}.self_attn.q_proj",)}, amount.layer_steps

    @torch.no_grad()
    def judge(pruned: nn.Module) -> dict[str, float]:
        return {"test": statistics.fmean(float(language_loss(pruned, part)) for part in held)}

    return Problem(model, batches, language_loss, judge, choice, steps)


class Nothing(nn.Module):
    """Stands where a layer's work is done already."""

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        """The states as they are."""
        return states


@torch.no_grad()
def _from_layer(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as states in front of the layer."""
    states = model.model(batch["input_ids"], use_cache=False, output_hidden_states=True).hidden_states[LAYER]
    return {"inputs_embeds": states, "labels": batch["labels"]}


def measure(
    seeds: Mapping[str, Sequence[int]], amount: Amount, unit: Units, cache: Path | None
) -> list[dict[str, Any]]:
    """Every arm of every problem and seed; those done before are read."""
    runs = []
    for kind in ("digits", "projection", "model"):
        for seed in seeds[kind]:
            small: list[Any] = []
            if kind == "digits":
                problem, small = digits_problem(seed, amount)
            else:
                problem = language_problem(seed, amount, kind == "projection", cache)
            groups = sum(
                target.groups for target in find_targets(problem.model, MagnitudeOptions(**problem.choice))
            )
            place = f"{kind} {seed}"
            arms = {"dense": unit(f"{place} dense", lambda p=problem: p.judge(p.model))}
            for name in ONE_SHOT:
                arms[name] = unit(f"{place} {name}", lambda p=problem, n=name: one_shot(p, n))
            rate = unit(f"{place} rate", lambda p=problem: rate_of(p))["rate"]
            plans = STARTS if kind == "projection" else STARTS | FURTHER
            if kind == "model":
                many = {"samples_per_step": MANY, "steps": problem.steps // MANY}
                plans |= {f"MaskPro from Wanda, {MANY} masks a step": {"init": "wanda", **many}}
                for name, each in CREDITS.items():
                    arms[f"MaskPro from Wanda, {name}"] = unit(
                        f"{place} {name}", lambda p=problem, e=each: credited(p, e, amount.credit_steps)
                    )
            if kind == "digits":
                plans |= ABLATIONS | {PUBLISHED_SCALE: {"init_scale": 10.0}}
                plans |= {
                    f"{name}, batches of 16": {**ABLATIONS.get(name, {}), "batches": small}
                    for name in (MAIN, *ABLATIONS)
                }
            for name, options in plans.items():
                arms[name] = unit(f"{place} {name}", lambda p=problem, r=rate, o=options: learnt(p, r, **o))
            runs.append({"problem": kind, "seed": seed, "groups": groups, "rate": rate, "arms": arms})
    return runs


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Losses by problem and arm, what was made good, the verdict."""
    table: dict[str, dict[str, Any]] = {}
    for kind in ("digits", "projection", "model"):
        mine = [run["arms"] for run in runs if run["problem"] == kind]
        table[kind] = {
            arm: {
                key: [arms[arm][key] for arms in mine]
                for key in ("test", "accuracy", "changed")
                if key in mine[0][arm]
            }
            for arm in (mine[0] if mine else ())
        }
    found = table["digits"]
    shares = [
        (magnitude - ours) / (magnitude - dense)
        for magnitude, ours, dense in zip(
            found["magnitude"]["test"], found[MAIN]["test"], found["dense"]["test"], strict=True
        )
    ]
    enough = sum(share >= 0.4 for share in shares)
    ours = statistics.fmean(found[MAIN]["test"])
    others = {name: statistics.fmean(found[name]["test"]) for name in ("residual, no tracker", "plain loss")}
    checks = {
        "at least 40 % of magnitude's loss made good for at least 4 of 5 seeds (or all of fewer)": enough
        >= min(4, len(shares)),
        "better than the residual alone and than the plain loss at the same rate": all(
            ours < other for other in others.values()
        ),
    }
    held = sum(checks.values())
    verdict = "reproduced" if held == 2 else "weaker claim" if held else "not shown"
    return {"losses": table, "made_good": shares, "checks": checks, "verdict": verdict}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    summary = results["summary"]
    lines = ["# MaskPro: masks learnt by forward passes", "", "Made by `python evidence/maskpro.py`."]
    units = {
        "digits": "cross-entropy on the test rows",
        "projection": "nats per character on the test split, one projection pruned",
        "model": "nats per character on the test split, all linear layers pruned",
    }
    for kind, arms in summary["losses"].items():
        mine = [run for run in results["runs"] if run["problem"] == kind]
        if not mine:
            continue
        seeds = ", ".join(str(run["seed"]) for run in mine)
        lines += [
            "",
            f"## {kind}",
            "",
            f"2:4, {mine[0]['groups']} groups, seeds {seeds}, {results['steps'][kind]} steps of MaskPro; "
            f"{units[kind]}, mean "
            "(range) over seeds.",
            "",
            "| arm | test loss | over dense | accuracy | groups changed |",
            "|---|---|---|---|---|",
        ]
        for arm, found in arms.items():
            lost = statistics.fmean(over_dense(arms, arm))
            accuracy = f"{statistics.fmean(found['accuracy']):.3f}" if "accuracy" in found else ""
            changed = f"{statistics.fmean(found['changed']):.2%}" if "changed" in found else ""
            lines.append(f"| {arm} | {spread(found['test'])} | {lost:.4f} | {accuracy} | {changed} |")
    made = ", ".join(f"{share:.0%}" for share in summary["made_good"])
    lines += ["", f"Digits, share of magnitude's loss that is made good, by seed: {made}.", ""]
    lines += [f"- {'holds' if held else '**fails**'}: {check}" for check, held in summary["checks"].items()]
    lines += ["", f"**Verdict: {summary['verdict']}.**", ""]
    return "\n".join(lines)


def over_dense(arms: Mapping[str, Any], arm: str) -> list[float]:
    """What an arm's test loss is above the dense model's, by seed."""
    return [ours - dense for ours, dense in zip(arms[arm]["test"], arms["dense"]["test"], strict=True)]


def spread(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} .. {max(values):.4f})"


def draw(results: Mapping[str, Any]) -> str:
    """What every arm and seed loses in test loss, on each problem, as SVG."""
    losses = results["summary"]["losses"]
    rows = {
        arm: 46 + 22 * row
        for row, arm in enumerate(dict.fromkeys(arm for arms in losses.values() for arm in arms))
        if arm != "dense"
    }
    foot = max(rows.values()) + 16
    body = []
    for kind, title, left, right in (
        ("digits", "Digits", 270, 450),
        ("projection", "One projection", 490, 670),
        ("model", "Whole model", 710, 890),
    ):
        lost = {arm: over_dense(losses[kind], arm) for arm in losses[kind] if arm != "dense"}
        if not lost:
            continue
        # What diverges is drawn at the edge.
        low, high = min(0.0, *map(min, lost.values())), 2 * max(lost["magnitude"]) + 1e-3
        scale = Scale(low, high, left, right)
        body.append(text(left, 20, title, "title"))
        for value in ticks(low, high):
            body += [
                line(scale(value), 30, scale(value), foot, "grid"),
                text(scale(value), foot + 14, number(value), "small", "middle"),
            ]
        for arm, values in lost.items():
            body += [
                dot(scale(min(value, high)), rows[arm], 4, "b" if "MaskPro" in arm else "a")
                for value in values
            ]
    body += [text(260, y + 4, arm, anchor="end") for arm, y in rows.items()]
    return page(910, foot + 28, "MaskPro: test loss above the dense model's, by arm and seed", body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "one seed, a few steps", seeds=(0, 1, 2, 3, 4), resumes=True)
    parser.add_argument(
        "--bed-seeds", type=int, nargs="+", default=[6, 7, 8], help="of the projection and the model"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    amount = QUICK if chosen.quick else Amount()
    seeds = {"digits": chosen.seeds, "projection": chosen.bed_seeds, "model": chosen.bed_seeds[:1]}
    if chosen.quick:
        seeds = {kind: [0] for kind in seeds}
    with units("maskpro", chosen, asdict(amount)) as unit:
        runs = measure(seeds, amount, unit, unit.folder / "bed" if chosen.quick else None)
    summary = summarise(runs)
    results = {
        "seeds": list(seeds["digits"]),
        "bed_seeds": list(seeds["projection"]),
        "amount": asdict(amount),
        "steps": {"digits": amount.steps, "projection": amount.layer_steps, "model": amount.model_steps},
        "environment": environment(),
        "summary": summary,
        "runs": runs,
        "verdict": summary["verdict"],
    }
    publish("maskpro", chosen, results, table(results), draw(results))


if __name__ == "__main__":
    main()
