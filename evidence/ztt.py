"""Cycles over the middle layers at equal weights: do they pay, does the zero token, and does its signal tell
who may leave early?

Characters of Python's standard library (testbed domain `source`), width 96, context 96, batches of 16, 1,300
steps of AdamW, cosine. And a task in which depth matters by construction: a permutation of eight symbols is
listed, and symbols are to be followed through it k = 1..4 times, sixteen of them in a row, each by itself;
training asks for one hop at first and for one more after each fifth of its steps, and all arms learn at one
rate. All arms of a seed see the same batches. On text each takes the learning rate of one grid with the
lowest loss on calibration text of the first seed; the other seeds take it over.

The rates and the hops were settled after looks at the first seed, its test losses among them: 1e-3 (V4, HTC)
and 6.3e-3 (V4, V6, BC, HTC) are worse than those left, on calibration and on test text, for each of these;
hops were 1..6, and all of them from the first step on, until V4 and HTC had learnt one hop at most.

    V4, V6             plain models of 4 and 6 layers: V4 has the weights of the cycled ones, V6 their compute
    BC 3x2             three layers, all twice;  HTC 4/2: four layers, the two in the middle twice
    ZTT 4/2, 4/3       the same with zero tokens, two or three cycles
    ZTT 4/2 ...        its gate on attention alone; zero scores that start at -2 and at -6; rate of ZTT 4/2

The kind of ZTT 4/2 that is judged has the lowest loss on the first seed's calibration text, and is the one
that other seeds train. Early exit: a threshold chosen on calibration text for 1 % more loss, against leaving
at random as often; numbers are of test text.

Reproduced if, over three seeds: ZTT 4/2 is below V4 by more than two standard errors of the paired
difference, and at most 0.015 nats above HTC; and exit leaves out 20 % of middle cycles for at most 1 % more
loss on test text, and beats random exit for each seed. If the zero token does not pay but cycles do (HTC or
ZTT below V4) and the signal beats random exit, the claim is weaker.

    python evidence/ztt.py            writes evidence/results/ztt.json and ztt.md
    python evidence/ztt.py --quick    a few steps, to see that everything runs; writes to --out only
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from script import Units, parser_of, publish, units
from torch.nn import functional as F

from weightsmith.runs.environment import environment
from weightsmith.runs.seeds import derive
from weightsmith.testbed import VOCABULARY, text
from weightsmith.training import ZTTConfig, ZTTForCausalLM, calibrate_exit
from weightsmith.training.zero_token import modeling

STEPS, HOP_STEPS, BATCH, CONTEXT, WIDTH, WARMUP = 1300, 2000, 16, 96, 96, 50
RATES, HOP_RATE = (2.5e-3, 4e-3), 2.5e-3
WINDOWS, ALLOWED, SAVED, NEAR = 160, 0.01, 0.2, 0.015
SYMBOLS, HOPS, QUERIES = 8, range(1, 5), 16
PLAIN = {"num_cycles": 1, "zero_token": False}
ARMS: dict[str, dict[str, Any]] = {
    "V4": {"layers": 4, **PLAIN},
    "V6": {"layers": 6, **PLAIN},
    "BC 3x2": {"layers": 3, "num_cycles": 2, "zero_token": False, "num_head_layers": 0, "num_tail_layers": 0},
    "HTC 4/2": {"layers": 4, "num_cycles": 2, "zero_token": False},
    "ZTT 4/2": {"layers": 4, "num_cycles": 2},
    "ZTT 4/2, b -2": {"layers": 4, "num_cycles": 2, "zero_bias_init": -2.0},
    "ZTT 4/2, b -6": {"layers": 4, "num_cycles": 2, "zero_bias_init": -6.0},
    "ZTT 4/2, gate attn": {"layers": 4, "num_cycles": 2, "gate": "attn"},
    "ZTT 4/3": {"layers": 4, "num_cycles": 3},
}
OURS = "ZTT 4/2"
KINDS = [arm for arm in ARMS if arm.startswith(OURS)]
HOP_ARMS = ("V4", "V6", "HTC 4/2", "ZTT 4/2")


def make_model(arm: str, vocabulary: int, seed: int) -> ZTTForCausalLM:
    """An arm's model with random weights; those that arms share by name and shape are the same."""
    options = dict(ARMS[arm])
    torch.manual_seed(seed)
    return ZTTForCausalLM(
        ZTTConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3,
            num_hidden_layers=options.pop("layers"),
            num_attention_heads=4,
            max_position_embeddings=4 * CONTEXT,
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            exit_level="token",
            **options,
        )
    )


@functools.cache
def characters(split: Any) -> torch.Tensor:
    """The text of a split as token ids."""
    return torch.tensor([VOCABULARY[letter] for letter in text("source", split)])


def windows(ids: torch.Tensor, number: int) -> list[dict[str, torch.Tensor]]:
    """Batches of windows at equal distances."""
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, number).long()
    rows = torch.stack([ids[start : start + CONTEXT] for start in starts])
    return [{"input_ids": part} for part in rows.split(32)]


def hops(number: int, random: torch.Generator, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a permutation's pairs, then questions with their answers, and labels that count answers alone.

    A token stands for a pair (x, π(x)) or a question (k, x): a hop is one look at the pairs, a layer's work.
    """
    order = torch.rand(number, SYMBOLS, generator=random).argsort(1)
    listed = torch.rand(number, SYMBOLS, generator=random).argsort(1)
    pairs = SYMBOLS * (1 + listed) + order.gather(1, listed)
    count = torch.randint(1, most + 1, (number, QUERIES), generator=random)
    start = torch.randint(0, SYMBOLS, (number, QUERIES), generator=random)
    answer = start
    for hop in range(most):
        answer = torch.where(hop < count, order.gather(1, answer), answer)
    asked = torch.stack([SYMBOLS * (SYMBOLS + count) + start, answer], 2)
    labels = torch.full_like(asked, -100)
    labels[:, :, 1] = answer
    rows = torch.cat([pairs, asked.flatten(1)], 1)
    return rows, torch.cat([torch.full_like(pairs, -100), labels.flatten(1)], 1)


def train(model: ZTTForCausalLM, lr: float, steps: int, batch: Any) -> float:
    """Train on `batch(step)` -> (ids, labels); seconds it took."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "bias" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "bias" in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    model.train()
    begun = time.perf_counter()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        ids, labels = batch(step)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return time.perf_counter() - begun


@torch.no_grad()
def measure(
    model: ZTTForCausalLM, batches: Sequence[Mapping[str, torch.Tensor]], **exits: Any
) -> dict[str, float]:
    """Mean loss and cycles of a token."""
    nats = cycles = tokens = 0.0
    for batch in batches:
        ids = batch["input_ids"]
        out = model(ids, **exits)
        nats += F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
        used = out.num_cycles_used
        used = used if used.ndim == 2 else used[:, None].expand_as(ids)
        cycles, tokens = cycles + float(used.sum()), tokens + ids.numel()
    return {
        "loss": nats / (tokens - sum(len(batch["input_ids"]) for batch in batches)),
        "cycles": cycles / tokens,
    }


def leave_early(model: ZTTForCausalLM, held_out: Any, test: Any, seed: int) -> dict[str, Any]:
    """What the calibrated threshold does on test text, and random exit of the same mean depth."""
    points = 12 if len(held_out) > 1 else 2
    found = calibrate_exit(model, held_out, max_loss_increase=ALLOWED, points=points)
    threshold = found.chosen.threshold
    model.config.exit_threshold = None
    full = measure(model, test)
    ours = (
        measure(model, test, exit_threshold=threshold, exit_level="token") if threshold is not None else full
    )
    # Of each cycle that may be left out, the same share of tokens leaves, by lot.
    steps = model.config.num_cycles - 1
    share = (model.config.num_cycles - ours["cycles"]) / steps
    stay = 1 - share
    for _ in range(20):  # tokens that left can't leave again: solve for the chance at each cycle
        kept = sum(stay**number for number in range(1, steps + 1)) / steps
        stay = min(1.0, max(0.0, stay + (1 - share - kept)))
    random = torch.Generator().manual_seed(derive(seed, "random exit") % 2**31)

    def lot(criterion: str, share_BT: torch.Tensor, *others: Any) -> torch.Tensor:
        return torch.rand(share_BT.shape, generator=random)

    with mock.patch.object(modeling, "signal", lot):
        chance = measure(model, test, exit_threshold=stay, exit_level="token")
    return {
        "threshold": threshold,
        "spread": found.spread,
        "curve": [vars(point) for point in found.curve],
        "full": full,
        "exit": ours,
        "random": chance,
        "saved": 1 - ours["cycles"] / full["cycles"],
        "rise": ours["loss"] / full["loss"] - 1,
    }


def run_text(arm: str, lr: float, seed: int, steps: int, number: int) -> dict[str, Any]:
    """One arm on text."""
    ids, held_out, test = (
        characters("train"),
        *(windows(characters(s), number) for s in ("calibration", "test")),
    )
    model = make_model(arm, len(VOCABULARY), seed)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(derive(seed, "batch", step) % 2**31)
        starts = torch.randint(0, len(ids) - CONTEXT, (BATCH,), generator=random)
        rows = torch.stack([ids[start : start + CONTEXT] for start in starts])
        return rows, rows

    seconds = train(model, lr, steps, batch)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    again = sum(layers[place] for place in model.config.middle) * (model.config.num_cycles - 1)
    weights = sum(p.numel() for p in model.parameters())
    result = {
        "parameters": weights,
        "flops_per_token": 2 * (weights - model.model.embed_tokens.weight.numel() + again),
        "training_seconds": seconds,
        "calibration": measure(model, held_out)["loss"],
        "test": measure(model, test)["loss"],
    }
    if model.config.zero_token and model.config.num_cycles > 1:
        with torch.no_grad():
            shares = [model(b["input_ids"], output_zero_attention=True).zero_attention for b in test]
        result["zero_attention"] = torch.cat(shares, 2).mean((1, 2, 3)).tolist()
        result["exit"] = leave_early(model, held_out, test, seed)
    return result


def run_hops(arm: str, lr: float, seed: int, steps: int, number: int) -> dict[str, Any]:
    """One arm on permutations: accuracy of the answer for each number of hops."""
    most = max(HOPS)
    model = make_model(arm, SYMBOLS * (SYMBOLS + most + 1), seed)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(derive(seed, "hops", step) % 2**31)
        return hops(2 * BATCH, random, min(most, 1 + step * (most + 1) // steps))

    seconds = train(model, lr, steps, batch)
    rows, _ = hops(8 * number, torch.Generator().manual_seed(derive(seed, "hops of the test") % 2**31), most)
    with torch.no_grad():
        right = (model(rows).logits[:, SYMBOLS::2].argmax(-1) == rows[:, SYMBOLS + 1 :: 2]).float()
    count = rows[:, SYMBOLS::2] // SYMBOLS - SYMBOLS
    return {"training_seconds": seconds, "accuracy": {hop: right[count == hop].mean().item() for hop in HOPS}}


def measure_all(
    seeds: Sequence[int], rates: Sequence[float], steps: int, hop_steps: int, number: int, unit: Units
) -> list[dict[str, Any]]:
    """Every arm of every seed and task, at the rate that was best for the first seed."""
    runs = []
    best: dict[str, float] = {}
    arms = list(ARMS)
    for seed in seeds:
        for arm in arms:
            # Another kind of zero token takes the rate of the first: it is no arm of its own.
            known = best.get(OURS if arm in KINDS else arm)
            tried = {}
            for lr in rates if known is None else [known]:
                made = functools.partial(run_text, arm, lr, seed, steps, number)
                tried[lr] = unit(f"{seed} text {arm} {lr:g}", made)
            losses = {lr: run["calibration"] for lr, run in tried.items()}
            lr = best[arm] = min(losses, key=lambda lr: losses[lr])
            runs.append({"task": "text", "arm": arm, "seed": seed, "lr": lr, "tried": losses, **tried[lr]})
        arms = [arm for arm in arms if arm not in KINDS or arm == judged(runs)]
        for arm in HOP_ARMS:
            made = functools.partial(run_hops, arm, HOP_RATE, seed, hop_steps, number)
            runs.append({"task": "hops", "arm": arm, "seed": seed, **unit(f"{seed} hops {arm}", made)})
    return runs


def column(runs: Sequence[Mapping[str, Any]], arm: str, key: str) -> list[float]:
    return [run[key] for run in runs if run["task"] == "text" and run["arm"] == arm]


def judged(runs: Sequence[Mapping[str, Any]]) -> str:
    """The kind of ZTT 4/2 that the first seed's calibration text chooses."""
    return min(KINDS, key=lambda arm: column(runs, arm, "calibration")[0])


def summarise(runs: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Paired differences, exit, the verdict."""
    ours = judged(runs)
    losses = {arm: column(runs, arm, "test") for arm in ARMS}
    paired = {
        other: [a - b for a, b in zip(losses[ours], losses[other], strict=True)]
        for other in ("V4", "V6", "HTC 4/2")
    }
    cycled = [a - b for a, b in zip(losses["HTC 4/2"], losses["V4"], strict=True)]
    exits = column(runs, ours, "exit")
    beats = [exit["exit"]["loss"] < exit["random"]["loss"] for exit in exits]
    checks = {
        f"{ours} below V4 by more than two standard errors": _clear(paired["V4"]),
        f"{ours} at most {NEAR} above HTC 4/2": statistics.fmean(paired["HTC 4/2"]) <= NEAR,
        f"exit leaves out at least {SAVED:.0%} of cycles": statistics.fmean(e["saved"] for e in exits)
        >= SAVED,
        "exit costs at most 1 % of test loss": statistics.fmean(e["rise"] for e in exits) <= ALLOWED,
        "exit beats random exit, each seed": all(beats),
    }
    weaker = (_clear(cycled) or _clear(paired["V4"])) and all(beats)
    verdict = "reproduced" if all(checks.values()) else "weaker claim" if weaker else "not shown"
    return {
        "judged": ours,
        "paired": paired,
        "htc_against_v4": cycled,
        "zero_token_against_htc": paired["HTC 4/2"],
        "checks": checks,
        "verdict": verdict,
    }


def _clear(differences: Sequence[float]) -> bool:
    """Whether a mean difference is below zero by two standard errors; one seed shows nothing."""
    if len(differences) < 3:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) < -2 * error


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    runs, summary = results["runs"], results["summary"]
    lines = [
        "# Zero-Token Transformer: cycles at equal weights",
        "",
        f"Seeds {', '.join(map(str, results['seeds']))}, {results['steps']} steps, width {WIDTH}, characters "
        "of Python's library. Nats a character on test text, mean (range) over an arm's seeds; operations of "
        "a forward pass relative to V4; median seconds on a core, beside other work. Each learning rate is "
        f"the best of {', '.join(f'{rate:g}' for rate in results['rates'])} on calibration text with the "
        "first seed. Made by `python evidence/ztt.py`.",
        "",
        "| arm | seeds | weights | operations | learning rate | seconds | test loss | attention to zero, by "
        "cycle |",
        "|---|---|---|---|---|---|---|---|",
    ]
    unit = column(runs, "V4", "flops_per_token")[0]
    for arm in ARMS:
        losses, seconds = column(runs, arm, "test"), column(runs, arm, "training_seconds")
        shares = [run.get("zero_attention") for run in runs if run["task"] == "text" and run["arm"] == arm]
        shown = (
            ", ".join(f"{statistics.fmean(s):.3f}" for s in zip(*shares, strict=True)) if shares[0] else ""
        )
        lines.append(
            f"| {arm} | {len(losses)} | {column(runs, arm, 'parameters')[0]:,} | "
            f"{column(runs, arm, 'flops_per_token')[0] / unit:.2f} | {column(runs, arm, 'lr')[0]:g} | "
            f"{statistics.median(seconds):.0f} | {spread(losses, 4)} | {shown} |"
        )
    lines += ["", f"Judged: {summary['judged']}. Paired differences of test loss, by seed:", ""]
    for other, values in (*summary["paired"].items(), ("HTC 4/2 less V4", summary["htc_against_v4"])):
        name = other if "less" in other else f"{summary['judged']} less {other}"
        lines.append(f"- {name}: {', '.join(f'{value:+.4f}' for value in values)}")
    first = {arm: column(runs, arm, "test")[0] for arm in ARMS}
    alone = [arm for arm in ARMS if len(column(runs, arm, "test")) == 1 < len(results["seeds"])]
    lines += [
        f"- {arm} less V4 and less HTC 4/2, the first seed alone: {first[arm] - first['V4']:+.4f}, "
        f"{first[arm] - first['HTC 4/2']:+.4f}"
        for arm in alone
    ]
    lines += [
        "",
        "Early exit at the threshold chosen on calibration text (1 % of loss), on test text:",
        "",
        "| arm | seed | cycles | of | loss | all cycles | random exit | signal's spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        if (exit := run.get("exit")) is not None:
            lines.append(
                f"| {run['arm']} | {run['seed']} "
                f"| {exit['exit']['cycles']:.2f} | {exit['full']['cycles']:.0f} | "
                f"{exit['exit']['loss']:.4f} | {exit['full']['loss']:.4f} | {exit['random']['loss']:.4f} | "
                f"{exit['spread']:.4f} |"
            )
    lines += [
        "",
        f"Following a symbol through a permutation, {results['hop_steps']} steps: answers right, mean over "
        f"seeds (guessing: {1 / SYMBOLS:.0%}):",
        "",
        "| arm | " + " | ".join(f"{hop} hops" for hop in HOPS) + " |",
        "|---" * (1 + len(HOPS)) + "|",
    ]
    for arm in HOP_ARMS:
        found = [run["accuracy"] for run in runs if run["task"] == "hops" and run["arm"] == arm]
        means = [statistics.fmean({int(k): v for k, v in one.items()}[hop] for one in found) for hop in HOPS]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.0%}" for mean in means) + " |")
    lines += [""] + [
        f"- {'holds' if held else '**fails**'}: {check}" for check, held in summary["checks"].items()
    ]
    lines += ["", f"**Verdict: {summary['verdict']}.**", ""]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "one seed, a few steps", resumes=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--hop-steps", type=int, default=HOP_STEPS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, rates, steps, hop_steps, number = chosen.seeds, RATES, chosen.steps, chosen.hop_steps, WINDOWS
    if chosen.quick:
        seeds, rates, steps, hop_steps, number = [0], RATES, 2, 2, 12
    with units("ztt", chosen, [steps, hop_steps, number]) as unit:
        runs = measure_all(seeds, rates, steps, hop_steps, number, unit)
    summary = summarise(runs, seeds)
    results = {
        "seeds": seeds,
        "rates": rates,
        "steps": steps,
        "hop_steps": hop_steps,
        "environment": environment(),
        "summary": summary,
        "runs": runs,
        "verdict": summary["verdict"],
    }
    publish("ztt", chosen, results, table(results))


if __name__ == "__main__":
    main()
