"""HRP: does the direction that a large adapter takes in a few steps serve a small one better than a random
one?

    python evidence/hrp.py [--seeds 0 1 2] [--work FOLDER]

Two parts. A linear target (96 x 96, singular values 0.8^k, 64 of them) whose best answer of rank 4 is known,
five
seeds: first with A frozen, where the main stage is solved exactly, then with both factors trained. And a
character model (2 layers, width 128, trained on documentation) that goes on with Python source by adapters of
rank 2 on all linear layers of its blocks; every start has the same number of steps, the preheat's and looks
at data counted (a look without a backward pass as a third of a step), and the learning rate of one grid at
which its mean loss over the seeds is lowest on the calibration text. Test losses are reported. Runs that are
done are kept in `--work`, so a stopped measurement goes on.

Held as reproduced: on the target, with A frozen, the loss falls with every larger preheat rank in each seed,
is the best possible at full rank, and at the adapter's own rank is that of a random A (to a tenth of what
there is to gain); with both trained HRP is ahead after 20 steps in each seed, the more the larger its rank,
and all end at the best. On text, with A frozen, HRP is better than a random orthonormal A by two standard
errors of the differences; with A trained it is not worse by more than one. As a weaker claim: the first part
alone.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from plots import page
from script import parser_of, publish
from tezo import BASE_STEPS, BATCH, LENGTH, Decoder, Texts, base_model, measured
from torch import Tensor, nn

from weightsmith import testbed
from weightsmith.reports.drawing import box, text
from weightsmith.runs.atomic import read_json, write_json
from weightsmith.runs.environment import environment
from weightsmith.training import HRPOptions, get_hrp_state_dict, initialize_lora_hrp_weights
from weightsmith.training.bed import cache_folder
from weightsmith.training.hrp.factors import filled

# The linear target.
SIZE, NONZERO, KEPT = 96, 64, 4
TARGET_SEEDS = (0, 1, 2, 3, 4)
RANKS = (4, 8, 16, 32, 64, 96)
MOMENTS = (20, 100, 400)
DESCENT = 0.3
# The text.
RANK, PREHEAT, LARGE = 2, 15, 64
STEPS, FROZEN_STEPS = 150, 120
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FULL_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LAYERS = ["qkv", "out", "up", "down"]
QUIET = {"show_progress_bar": False}


# Code that decides the result of a run, here and in tezo.py.
DECISIVE = (
    *("Matrix", "target_of", "rows_of", "descended", "linear", "adapted", "Start", "kaiming", "orthonormal"),
    *("eva", "gradient", "pissa", "hrp", "full", "tuned"),
)
BORROWED = ("Decoder", "Block", "Texts", "measured", "base_model")


class Matrix(nn.Module):
    """Half the squared distance of a layer, which is 0, from a target."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.layer = nn.Linear(SIZE, SIZE, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self) -> Tensor:
        """The loss."""
        return (self.layer(torch.eye(SIZE)).mT - self.target).square().sum() / 2


def target_of(seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(SIZE, SIZE, generator=random))[0] for _ in range(2))
    return (u[:, :NONZERO] * 0.8 ** torch.arange(NONZERO)) @ v[:, :NONZERO].mT


def rows_of(target: Tensor, **options: Any) -> Tensor:
    """What HRP puts into A."""
    model = get_peft_model(Matrix(target), LoraConfig(r=KEPT, lora_alpha=KEPT, target_modules=["layer"]))
    found = get_hrp_state_dict(model, train_step=lambda model, step: model(), force=True, **options, **QUIET)
    return found["layer"]


def descended(target: Tensor, rows: Tensor) -> dict[int, float]:
    """Squared distance after some steps of plain descent of both factors, B from 0."""
    a, b, found = rows.clone(), torch.zeros(SIZE, KEPT), {}
    for step in range(1, max(MOMENTS) + 1):
        gradient = b @ a - target
        a, b = a - DESCENT * b.mT @ gradient, b - DESCENT * gradient @ a.mT
        if step in MOMENTS:
            found[step] = float((b @ a - target).square().sum())
    return found


def linear(seed: int, ranks: Sequence[int] = RANKS) -> dict[str, Any]:
    """One target: what is left with A frozen, and with both trained."""
    target = target_of(seed)
    values = torch.linalg.svdvals(target)
    # With the same scale and a rate of 1 one step on B alone is its optimum: the curvature is 1.
    exact = {"trainable": "B", "preheat_scale": "same", "preheat_optimizer": "sgd", "preheat_lr": 1.0}
    rows = {"random": filled(torch.zeros(SIZE, 0), KEPT, 1000 + seed).mT}
    for rank in ranks:
        rows[f"R={rank}"] = rows_of(target, **exact, preheat_rank=rank, preheat_steps=2, seed=seed)
    adam = rows_of(target, preheat_rank=32, preheat_steps=10, preheat_lr=0.05, seed=seed)

    def left(a: Tensor) -> float:
        return float((target - target @ a.mT @ a).square().sum())

    total, best = float(values.square().sum()), float(values[KEPT:].square().sum())
    return {
        "seed": seed,
        "total": total,
        "best": best,
        "frozen": {name: left(a) for name, a in rows.items()},
        "both, 10 Adam steps, excess": (left(adam) - best) / (total - best),
        "trained": {name: descended(target, a) for name, a in rows.items()},
    }


def adapted(base: Decoder, **more: Any) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS, **more)
    return get_peft_model(copy.deepcopy(base), config)


class Start:
    """Everything that a start may use: batches of its own, the run's rate."""

    def __init__(self, base: Decoder, texts: Texts, rate: float, seed: int) -> None:
        self.base, self.texts, self.rate, self.seed = base, texts, rate, seed

    def batch(self, number: int) -> Tensor:
        """Batches of the head of the stream: no run reads them again."""
        return self.texts.batch("source", "train", 1_000_000 * (self.seed + 1) + number)


def kaiming(start: Start) -> tuple[Any, int]:
    torch.manual_seed(start.seed)
    return adapted(start.base), 0


def orthonormal(start: Start) -> tuple[Any, int]:
    model = adapted(start.base)
    sizes = {
        name: module.in_features
        for name, module in start.base.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = {
        name: filled(torch.zeros(size, 0), RANK, 7919 * start.seed + place).mT.contiguous()
        for place, (name, size) in enumerate(sizes.items())
        if name.rpartition(".")[2] in LAYERS
    }
    initialize_lora_hrp_weights(model, hrp_state_dict=found)
    return model, 0


def eva(start: Start) -> tuple[Any, int]:
    torch.manual_seed(start.seed)
    model = adapted(start.base, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    initialize_lora_eva_weights(
        model,
        [start.batch(number) for number in range(PREHEAT)],
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0].flatten(0, -2),
        show_progress_bar=False,
    )
    return model, PREHEAT // 3


def gradient(start: Start) -> tuple[Any, int]:
    """The leading directions of the summed gradient of the weights, as LoRA-GA and LoRA-One take them for
    A.
    """
    bare = copy.deepcopy(start.base)
    for number in range(PREHEAT):
        bare(start.batch(number)).backward()
    found = {}
    for name, module in bare.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LAYERS:
            assert module.weight.grad is not None
            found[name] = torch.linalg.svd(module.weight.grad, full_matrices=False)[2][:RANK].contiguous()
    model = adapted(start.base)
    initialize_lora_hrp_weights(model, hrp_state_dict=found)
    return model, PREHEAT


def pissa(start: Start) -> tuple[Any, int]:
    return adapted(start.base, init_lora_weights="pissa"), 0


def hrp(**options: Any) -> Callable[[Start], tuple[Any, int]]:
    def make(start: Start) -> tuple[Any, int]:
        model = adapted(start.base)
        chosen = HRPOptions(preheat_rank=LARGE, preheat_steps=PREHEAT, preheat_lr=start.rate, seed=start.seed)
        initialize_lora_hrp_weights(
            model,
            train_step=lambda model, step: model(start.batch(step)),
            options=HRPOptions.of(chosen, **options),
            **QUIET,
        )
        return model, PREHEAT

    return make


def full(start: Start) -> tuple[Any, int]:
    return copy.deepcopy(start.base), 0


STARTS: dict[str, Callable[[Start], tuple[Any, int]]] = {
    "random (Kaiming)": kaiming,
    "random (orthonormal)": orthonormal,
    "EVA": eva,
    "gradient": gradient,
    "PiSSA": pissa,
    "HRP": hrp(),
    "HRP, B alone in the preheat": hrp(trainable="B"),
    "warm start of A and B": hrp(assign="both"),
    "all weights": full,
}
FROZEN = ("random (orthonormal)", "HRP")


def tuned(
    method: str, rate: float, seed: int, frozen: bool, base: Decoder, texts: Texts, steps: int, batches: int
) -> dict[str, Any]:
    """One fine-tune of `steps` steps in all."""
    start = Start(base, texts, rate, seed)
    # The preheat's own rate is the run's, as ordinary users have it; with A frozen the spec's 3e-3.
    made = STARTS[method] if not (frozen and method == "HRP") else hrp(preheat_lr=3e-3)
    model, spent = made(start)
    trained = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (frozen and "lora_A" in name)
    ]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    for step in range(spent, max(steps, spent + 1)):
        optimizer.zero_grad()
        loss = model(start.batch(PREHEAT + step))
        loss.backward()
        if not math.isfinite(float(loss.detach())):
            break
        optimizer.step()
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "calibration": measured(model, texts, "calibration", batches),
        "test": measured(model, texts, "test", 2 * batches),
    }


class Runs:
    """Fine-tunes; those that are done are read."""

    def __init__(self, base: Decoder, texts: Texts, batches: int, work: Path) -> None:
        self.base, self.texts, self.batches, self.work = base, texts, batches, work

    def __call__(self, method: str, rate: float, seed: int, steps: int, *, frozen: bool) -> dict[str, Any]:
        """The result of one."""
        words = "".join(c if c.isalnum() else "_" for c in method)
        file = self.work / f"{'frozen' if frozen else 'trained'}-{words}-{rate:g}-{seed}.json"
        if not file.exists():
            begun = time.perf_counter()
            found = tuned(method, rate, seed, frozen, self.base, self.texts, steps, self.batches)
            write_json(file, found)
            print(f"{file.stem}: {found['test']:.4f} ({time.perf_counter() - begun:.0f} s)", flush=True)
        return read_json(file)


def best_rate(runs: Sequence[Mapping[str, Any]]) -> float:
    """The rate with the lowest mean loss on the calibration text."""
    rates = sorted({run["rate"] for run in runs})

    def mean(rate: float) -> float:
        return statistics.fmean(run["calibration"] for run in runs if run["rate"] == rate)

    return min(rates, key=lambda rate: mean(rate) if math.isfinite(mean(rate)) else math.inf)


def chosen_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test losses by seed at the best rate."""
    rate = best_rate(runs)
    return {"rate": rate, "test": [run["test"] for run in runs if run["rate"] == rate]}


def behind(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of one - other by seed, and its standard error."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return differences[0], math.inf
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def summarise(
    targets: Sequence[Mapping[str, Any]],
    trained: Mapping[str, Mapping[str, Any]],
    frozen: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The checks, the verdict."""
    names = [name for name in targets[0]["frozen"] if name != "random"]

    def falls(found: Mapping[str, float]) -> bool:
        values = [found[name] for name in names]
        return all(b < a for a, b in itertools.pairwise(values))

    own = statistics.fmean(t["frozen"]["R=4"] - t["frozen"]["random"] for t in targets)
    room = statistics.fmean(t["total"] - t["best"] for t in targets)
    last = [str(moment) for moment in MOMENTS]
    order = [name for name in ("R=64", "R=16", "random") if name in targets[0]["trained"]]

    def at(found: Mapping[str, Any], name: str, moment: str) -> float:
        moments = {str(key): value for key, value in found["trained"][name].items()}
        return moments[moment]

    first = {
        "A frozen: the loss falls with every larger preheat rank, in each seed": all(
            falls(t["frozen"]) for t in targets
        ),
        "A frozen: at full rank it is the best possible (to 1e-4)": all(
            abs(t["frozen"]["R=96"] / t["best"] - 1) < 1e-4 for t in targets
        ),
        "A frozen: at the adapter's own rank it is that of a random A (a tenth of the gain)": abs(own)
        < 0.1 * room,
        "both trained: after 20 steps R=64 is ahead of R=16, and that of random, in each seed": all(
            all(at(t, a, last[0]) < at(t, b, last[0]) for a, b in itertools.pairwise(order)) for t in targets
        ),
        "both trained: after 400 steps all are at the best (to 1 %)": all(
            at(t, name, last[-1]) < 1.01 * t["best"] for t in targets for name in t["trained"]
        ),
    }
    ahead, error = behind(frozen[FROZEN[0]]["test"], frozen["HRP"]["test"])
    worse, its_error = behind(trained["HRP"]["test"], trained[FROZEN[0]]["test"])
    second = {
        "text, A frozen: HRP better than random by 2 standard errors": ahead >= 2 * error,
        "text, A trained: HRP not worse than random by more than 1 standard error": worse <= its_error,
    }
    held = all(first.values())
    verdict = "reproduced" if held and all(second.values()) else "weaker claim" if held else "not shown"
    return {
        "checks": {**first, **second},
        "verdict": verdict,
        "ahead_frozen": [ahead, error if math.isfinite(error) else None],
        "behind_trained": [worse, its_error if math.isfinite(its_error) else None],
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    targets, found = results["targets"], results["summary"]
    names = list(targets[0]["frozen"])
    rates = ", ".join(f"{rate:g}" for rate in results["rates"])
    mean = {name: statistics.fmean(t["frozen"][name] for t in targets) for name in names}
    lines = [
        "# HRP: the direction in which a small adapter begins",
        "",
        f"**Verdict: {found['verdict']}.** Made by `python evidence/hrp.py`; what counts was set before.",
        "",
        *(f"- {'holds' if held else 'misses'}: {words}" for words, held in found["checks"].items()),
        "",
        f"**A linear target** ({SIZE} x {SIZE}, rank {KEPT}, {len(targets)} seeds).",
        "",
        f"Squared distance: {targets[0]['total']:.3f} before, {targets[0]['best']:.3f} at best. Means over "
        "seeds.",
        "",
        "| start of A | A frozen, B solved | both trained, "
        + " | ".join(f"{m} steps" for m in MOMENTS)
        + " |",
        "|---|---|" + "---|" * len(MOMENTS),
    ]
    for name in names:
        values = [
            statistics.fmean({str(k): v for k, v in t["trained"][name].items()}[str(m)] for t in targets)
            for m in MOMENTS
        ]
        lines.append(f"| {name} | {mean[name]:.3f} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    excess = statistics.fmean(t["both, 10 Adam steps, excess"] for t in targets)
    lines += [
        "",
        "The preheat here trains B alone, to its optimum. One of both factors by ten steps of Adam at R=32 "
        f"leaves {excess:.1%} of the gain unmade with A frozen.",
        "",
        f"**Text** ({len(results['seeds'])} seeds, {results['batch']} windows of {LENGTH} characters a step)",
        "",
        f"Test loss in nats, mean (range), rank {RANK}; preheat of rank {LARGE} in {PREHEAT} steps, counted;",
        f"before {results['start']:.4f}. Of the rates {rates} the one that is best on the calibration text;",
        "with A frozen HRP's preheat has 3e-3.",
        "",
        f"| start | A trained, {results['steps']} steps | rate | A frozen, {results['frozen_steps']} steps "
        "| rate |",
        "|---|---|---|---|---|",
    ]
    for method, run in results["trained"].items():
        other = results["frozen"].get(method)
        more = f"{spread(other['test'])} | {other['rate']:g}" if other else "– | –"
        lines.append(f"| {method} | {spread(run['test'])} | {run['rate']:g} | {more} |")
    ahead, error = found["ahead_frozen"]
    worse, its_error = found["behind_trained"]
    lines += [
        "",
        f"With A frozen HRP is ahead of a random orthonormal A by {ahead:.4f} nats"
        + (f" (standard error {error:.4f})" if error is not None else "")
        + f"; with A trained it is {'behind' if worse > 0 else 'ahead'} by {abs(worse):.4f}"
        + (f" (standard error {its_error:.4f})." if its_error is not None else "."),
        "",
    ]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} .. {max(values):.4f})"


def draw(results: Mapping[str, Any]) -> str:
    """Test losses with A trained and frozen as bars from the lowest to the start."""
    rows = [(name, run["test"]) for name, run in results["trained"].items()]
    rows += [(f"{name}, A frozen", run["test"]) for name, run in results["frozen"].items()]
    low = min(min(values) for _, values in rows)
    scale = 380 / max(results["start"] - low, 1e-9)
    body = []
    for place, (name, values) in enumerate(rows):
        y = 40 + 24 * place
        body.append(text(236, y + 12, name, "small", "end"))
        left, right = (250 + scale * (edge(values) - low) for edge in (min, max))
        body.append(box(left, y, max(right - left, 3), 16, style="fill: hsl(210 55% 50%)"))
        body.append(text(right + 8, y + 12, f"{statistics.fmean(values):.4f}", "small"))
    return page(740, 60 + 24 * len(rows), "Test loss after fine-tuning, range over seeds", body)


def measure(chosen: argparse.Namespace, work: Path, seeds: Sequence[int], quick: bool) -> None:
    """All runs, and their table."""
    work.mkdir(parents=True, exist_ok=True)
    targets = []
    for seed in TARGET_SEEDS[:1] if quick else TARGET_SEEDS:
        file = work / f"target-{seed}.json"
        if not file.exists():
            write_json(file, linear(seed))
        targets.append(read_json(file))
    texts = Texts()
    batches = 1 if quick else 6
    base = base_model(texts, 2 if quick else BASE_STEPS, work)
    runs = Runs(base, texts, batches, work)
    steps, frozen_steps = (PREHEAT + 1, PREHEAT + 1) if quick else (STEPS, FROZEN_STEPS)
    rates, full_rates = (RATES[1:2], FULL_RATES[1:2]) if quick else (RATES, FULL_RATES)
    everything: dict[str, dict[str, list[Any]]] = {"trained": {}, "frozen": {}}
    for seed in seeds:  # seed by seed, so that a measurement that was stopped has whole ones
        for method in FROZEN:
            for rate in rates:
                run = runs(method, rate, seed, frozen_steps, frozen=True)
                everything["frozen"].setdefault(method, []).append(run)
        for method in STARTS:
            for rate in full_rates if method == "all weights" else rates:
                run = runs(method, rate, seed, steps, frozen=False)
                everything["trained"].setdefault(method, []).append(run)
    best = {
        kind: {method: chosen_of(found) for method, found in methods.items()}
        for kind, methods in everything.items()
    }
    summary = summarise(targets, best["trained"], best["frozen"])
    results = {
        "seeds": list(seeds),
        "steps": steps,
        "frozen_steps": frozen_steps,
        "batch": BATCH,
        "rates": list(rates),
        "environment": environment(),
        "verdict": summary["verdict"],
        "summary": summary,
        "start": measured(base, texts, "test", 2 * batches),
        "targets": targets,
        **best,
        "runs": everything,
    }
    publish("hrp", chosen, results, table(results), draw(results))


def code(file: str, names: Sequence[str]) -> list[str]:
    """These classes and functions of a script, without comments."""
    tree = ast.parse((Path(__file__).parent / file).read_text())
    return [ast.unparse(node) for node in tree.body if getattr(node, "name", "") in names]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "one seed, one rate, one step after the preheat")
    parser.add_argument("--work", type=Path, help="folder of runs that are done (default: the user's cache)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = [0] if chosen.quick else chosen.seeds
    # What decides the result of a run: its sizes, and the code that it goes through.
    facts = [testbed.fingerprint(), torch.__version__, chosen.quick, RATES, FULL_RATES, STEPS, FROZEN_STEPS]
    facts += [RANK, PREHEAT, LARGE, BASE_STEPS, *code("hrp.py", DECISIVE), *code("tezo.py", BORROWED)]
    key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=6).hexdigest()
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) if chosen.quick else cache_folder().parent / "evidence" / "hrp"
        measure(chosen, (chosen.work or kept) / key, seeds, chosen.quick)


if __name__ == "__main__":
    main()
