"""LightSAM works over a wide range of learning rates and radii where SAM fails in most of it.

Handwritten digits (8 by 8), 1,000 for training with a fifth of their labels drawn at random, 297 for
calibration, 500 for testing; a 64-64-10 network, batches of 64, 60 epochs, no schedule. Each method gets the
nine settings of a grid two decades wide in the learning rate and in the radius: {0.1, 1, 10} for methods
whose rates are lengths of the whole step, {0.003, 0.03, 0.3} for rates of each coordinate. One-pass controls
have the three learning rates.

    claim 1  over the nine settings LightSAM's test accuracy is high and SAM's is not
    claim 2  the minima found are flatter than SGD's: at the first epoch with the same training loss, the loss
             rises less on a step of 0.5 along the gradient

Reproduced if, over three seeds: mean over the grid of LightSAM-I minus SAM's at least 25 points, failures
(accuracy below 50 %) at most a third of SAM's, best (chosen on calibration) at least SAM's best minus 1.5;
and claim 2 for each seed. Controls separate the two adaptive rates: SAM's perturbation with AdaGrad-Norm's
update, and LightSAM-I's with SGD's.

    python evidence/lightsam.py            writes evidence/results/lightsam.json, lightsam.md and lightsam.svg
    python evidence/lightsam.py --quick    a few steps, to see that everything runs; writes to --out only
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plots import page
from script import parser_of, publish
from torch import nn

from weightsmith.reports.drawing import box, text
from weightsmith.runs.environment import environment
from weightsmith.training import SAM, LightSAM

HERE = Path(__file__).parent
RESULTS = HERE / "results"
EPOCHS, BATCH, TRAIN, CALIBRATION, TEST, NOISE, RADIUS = 60, 64, 1000, 297, 500, 0.2, 0.5
WHOLE, EACH = (0.1, 1.0, 10.0), (0.003, 0.03, 0.3)


class AdaGradNorm(torch.optim.Optimizer):
    """x <- x - lr g / sqrt(sum of squared norms): LightSAM-I's update without its perturbation."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.total = 1e-16

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; a closure is run first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.total += sum(p.grad.square().sum().item() for p in parameters)
        for parameter in parameters:
            parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"] / self.total**0.5)
        return loss


class LightPerturbation(LightSAM):
    """LightSAM-I's perturbation with SGD's update."""

    def __init__(self, params: Any, lr: float, rho: float) -> None:
        super().__init__(params, lr, rho, variant="I")

    def _descend(self, pieces: Any, norm: Any, skip: Any) -> None:
        for piece in pieces:
            piece.value.sub_(piece.gradient, alpha=piece.group["lr"])


Maker = Callable[[Iterable[torch.Tensor], float, float], torch.optim.Optimizer]
METHODS: dict[str, tuple[Maker, Sequence[float], Sequence[float]]] = {
    "SAM (SGD)": (lambda p, lr, rho: SAM(p, torch.optim.SGD, lr=lr, rho=rho), WHOLE, WHOLE),
    "LightSAM-I": (lambda p, lr, rho: LightSAM(p, lr, rho, "I"), WHOLE, WHOLE),
    "LightSAM-II": (lambda p, lr, rho: LightSAM(p, lr, rho, "II"), EACH, EACH),
    "LightSAM-III": (lambda p, lr, rho: LightSAM(p, lr, rho, "III"), EACH, EACH),
    "SAM, AdaGrad-Norm's update": (lambda p, lr, rho: SAM(p, AdaGradNorm, lr=lr, rho=rho), WHOLE, WHOLE),
    "LightSAM-I, SGD's update": (LightPerturbation, WHOLE, WHOLE),
    "SGD": (lambda p, lr, rho: torch.optim.SGD(p, lr=lr), WHOLE, (0.0,)),
    "AdaGrad-Norm": (lambda p, lr, rho: AdaGradNorm(p, lr), WHOLE, (0.0,)),
    "Adam": (lambda p, lr, rho: torch.optim.Adam(p, lr=lr), EACH, (0.0,)),
}


def digits(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The three splits; the training labels carry the noise."""
    held = np.load(HERE / "data" / "digits.npz")
    x = torch.from_numpy(held["pixels"]).float() / 16
    y = torch.from_numpy(held["labels"]).long()
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=random)
    parts = order[: TRAIN + CALIBRATION + TEST].split([TRAIN, CALIBRATION, TEST])
    splits = {
        name: (x[rows], y[rows]) for name, rows in zip(("train", "calibration", "test"), parts, strict=True)
    }
    wrong = torch.rand(TRAIN, generator=random) < NOISE
    labels = torch.where(wrong, torch.randint(0, 10, (TRAIN,), generator=random), splits["train"][1])
    return {**splits, "train": (splits["train"][0], labels)}


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model: nn.Module, split: tuple[torch.Tensor, torch.Tensor]) -> float:
    return (model(split[0]).argmax(1) == split[1]).float().mean().item()


def sharpness(model: nn.Module, split: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Loss on all of a split, and its rise on a step of length `RADIUS` along the gradient."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(split[0]), split[1])
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(gradient, alpha=RADIUS / (norm.item() + 1e-12))
        risen = nn.functional.cross_entropy(model(split[0]), split[1])
    return loss.item(), (risen - loss).item()


def train(make: Maker, lr: float, rho: float, seed: int, epochs: int) -> dict[str, Any]:
    """One run; the same seed gives the same data, weights and batches to every method and setting."""
    splits = digits(seed)
    x, y = splits["train"]
    model = make_model(seed)
    optimizer = make(model.parameters(), lr, rho)
    batches = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN, generator=batches).split(BATCH):

            def closure(rows: torch.Tensor = rows) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
        history.append(sharpness(model, splits["train"]))
    return {
        "lr": lr,
        "rho": rho,
        "calibration": accuracy(model, splits["calibration"]),
        "test": accuracy(model, splits["test"]),
        "history": history,
    }


def measure(seeds: Sequence[int], epochs: int) -> list[dict[str, Any]]:
    """Every setting of every method for every seed."""
    runs = []
    for seed in seeds:
        for method, (make, rates, radii) in METHODS.items():
            begun = time.perf_counter()
            found = [train(make, lr, rho, seed, epochs) for lr in rates for rho in radii]
            runs += [{"seed": seed, "method": method, **run} for run in found]
            mean = statistics.fmean(run["test"] for run in found)
            print(
                f"seed {seed} {method:28s} mean {mean:.1%} ({time.perf_counter() - begun:.0f} s)", flush=True
            )
    return runs


def flatness(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rise of the loss of each run at its first epoch with the training loss that all of them reach."""
    reach = max(min(loss for loss, _ in run["history"]) for run in found.values())
    return {
        "train_loss": reach,
        "rise": {
            method: next(rise for loss, rise in run["history"] if loss <= reach)
            for method, run in found.items()
        },
    }


def summarise(runs: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean, spread, worst, failures and best of each method by seed; flatness; the verdict."""
    methods: dict[str, dict[str, list[float]]] = {}
    flat = []
    for seed in seeds:
        best = {}
        for method in METHODS:
            found = [run for run in runs if run["seed"] == seed and run["method"] == method]
            tests = [run["test"] for run in found]
            best[method] = max(found, key=lambda run: run["calibration"])
            entry = {
                "mean": statistics.fmean(tests),
                "sd": statistics.pstdev(tests),
                "worst": min(tests),
                "failures": sum(test < 0.5 for test in tests),
                "best": best[method]["test"],
            }
            for name, value in entry.items():
                methods.setdefault(method, {}).setdefault(name, []).append(value)
        flat.append(
            flatness({method: best[method] for method in ("SGD", "SAM (SGD)", "LightSAM-I", "LightSAM-II")})
        )
    ours, theirs = methods["LightSAM-I"], methods["SAM (SGD)"]
    gap = statistics.fmean(ours["mean"]) - statistics.fmean(theirs["mean"])
    checks = {
        "mean over the grid: LightSAM-I at least 25 points above SAM": gap >= 0.25,
        "failures: LightSAM-I at most a third of SAM's": sum(ours["failures"]) <= sum(theirs["failures"]) / 3,
        "best: LightSAM-I at least SAM's minus 1.5 points": statistics.fmean(ours["best"])
        >= statistics.fmean(theirs["best"]) - 0.015,
        "flatter than SGD at equal training loss, each seed": all(
            entry["rise"]["LightSAM-I"] < entry["rise"]["SGD"] for entry in flat
        ),
    }
    held = list(checks.values())
    verdict = (
        "reproduced"
        if all(held)
        else "weaker claim"
        if all(held[:3]) or (gap > 0.1 and held[2])
        else "not shown"
    )
    return {"methods": methods, "flatness": flat, "checks": checks, "verdict": verdict}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    summary = results["summary"]
    lines = [
        "# LightSAM: how much depends on learning rate and radius",
        "",
        f"Seeds {', '.join(map(str, results['seeds']))}, {results['epochs']} epochs, digits with {NOISE:.0%} "
        "random training labels. Test accuracy in percent, mean (range) over seeds of what nine settings "
        "give (three for one-pass methods). Best: the setting chosen on calibration. Made by "
        "`python evidence/lightsam.py`.",
        "",
        "| method | mean of settings | sd of settings | worst | failures (< 50 %) | best |",
        "|---|---|---|---|---|---|",
    ]
    for method, found in summary["methods"].items():
        settings = len(METHODS[method][1]) * len(METHODS[method][2])
        failures = ", ".join(f"{count:.0f}" for count in found["failures"])
        lines.append(
            f"| {method} | {spread(found['mean'])} | {spread(found['sd'])} | {spread(found['worst'])} "
            f"| {failures} of {settings} | {spread(found['best'])} |"
        )
    lines += [
        "",
        f"Rise of the training loss on a step of length {RADIUS} along the gradient, at the first epoch with "
        "the training loss that all four reach (best settings):",
        "",
        "| seed | training loss | " + " | ".join(summary["flatness"][0]["rise"]) + " |",
        "|---" * (2 + len(summary["flatness"][0]["rise"])) + "|",
    ]
    for seed, entry in zip(results["seeds"], summary["flatness"], strict=True):
        rises = " | ".join(f"{rise:.3f}" for rise in entry["rise"].values())
        lines.append(f"| {seed} | {entry['train_loss']:.3f} | {rises} |")
    lines += [""] + [
        f"- {'holds' if held else '**fails**'}: {check}" for check, held in summary["checks"].items()
    ]
    lines += ["", f"**Verdict: {summary['verdict']}.**", ""]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    scaled = [100 * value for value in values]
    return f"{statistics.fmean(scaled):.1f} ({min(scaled):.1f} .. {max(scaled):.1f})"


def draw(results: Mapping[str, Any]) -> str:
    """Test accuracy over the grid, mean of seeds, for the four two-pass methods, as SVG."""
    shown = ("SAM (SGD)", "LightSAM-I", "LightSAM-II", "LightSAM-III")
    cell, gap, top = 48, 56, 46
    body = []
    for number, method in enumerate(shown):
        _, rates, radii = METHODS[method]
        left = 60 + number * (3 * cell + gap)
        body.append(text(left, 22, method, "title"))
        for i, lr in enumerate(reversed(rates)):
            y = top + i * cell
            body.append(text(left - 6, y + cell / 2 + 4, f"{lr:g}", "small", "end"))
            for j, rho in enumerate(radii):
                found = [
                    r["test"]
                    for r in results["runs"]
                    if (r["method"], r["lr"], r["rho"]) == (method, lr, rho)
                ]
                mean = statistics.fmean(found)
                x = left + j * cell
                # From red at chance to green at all right.
                style = f"fill: hsl({round(130 * (mean - 0.1) / 0.9)} 55% 45%)"
                body.append(box(x, y, cell - 2, cell - 2, style=style))
                body.append(text(x + cell / 2 - 1, y + cell / 2 + 4, f"{100 * mean:.0f}", "light", "middle"))
        for j, rho in enumerate(radii):
            body.append(text(left + (j + 0.5) * cell, top + 3 * cell + 14, f"{rho:g}", "small", "middle"))
        body.append(text(left + 1.5 * cell, top + 3 * cell + 30, "radius", "small", "middle"))
    body.append(text(6, 40, "learning rate", "small"))
    return page(
        60 + 4 * (3 * cell + gap),
        top + 3 * cell + 40,
        "LightSAM: accuracy over learning rate and radius",
        body,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "one seed, one epoch")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    chosen = parser.parse_args(arguments)
    seeds, epochs = ([0], 1) if chosen.quick else (chosen.seeds, chosen.epochs)
    torch.set_num_threads(1)
    runs = measure(seeds, epochs)
    results = {
        "seeds": seeds,
        "epochs": epochs,
        "environment": environment(),
        "summary": summarise(runs, seeds),
        "runs": runs,
    }
    results["verdict"] = results["summary"]["verdict"]
    words, drawing = table(results), draw(results)
    for run in runs:
        # A run that diverged has no loss; JSON has no NaN.
        run["history"] = [
            [round(value, 4) if math.isfinite(value) else None for value in pair]
            for pair in run["history"][9::10]
        ]
    publish("lightsam", chosen, results, words, drawing)


if __name__ == "__main__":
    main()
