"""SeWA against its peers on one and the same window of candidates, with the passes that each method makes.

Classifier    An MLP with 30 % wrong training labels at a high constant learning rate; 100 candidates, every
              10 steps. Three windows: clean; corrupted (Gaussian noise of twice the weights' sd on a quarter
              of the candidates, a stand-in for spikes); natural (bad batches, shuffled labels without
              clipping, in one step of 50).
Cloning       A pendulum is swung up by a policy cloned from good and mediocre demonstrations; choices are
              made by the cloning loss on demonstrations, never by the return that is reported.

Every method sees the same candidates and may use the same held-out set. `train` chooses by the training loss
(the paper's criterion), `val` by the held-out loss. Test numbers are on clean labels or in rollouts. TWA,
which no registry has, is a plain formulation: gradients projected on the span of the candidates, from their
mean, its learning rate tuned on the held-out set.

Reproduced if, over five seeds, SeWA (val) picks less than 5 % bad states of the corrupted window and is
better there than LAWA, evenly spread and random candidates by two standard errors, is at least as good as
LAWA and random ones in the clean window, and its cloned policy's return is at least LAWA's, above the last
state's, and varies less over seeds than that.

    python evidence/sewa.py            writes evidence/results/sewa.json, .md and .svg
    python evidence/sewa.py --quick    one seed, short, to see that everything runs; writes to --out only
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from plots import page
from script import parser_of, publish
from torch import Tensor, nn

from weightsmith.reports.drawing import Scale, box, dot, line, number, text
from weightsmith.runs.environment import environment
from weightsmith.training import AveragingOptions, MemoryBank, SeWAOptions
from weightsmith.training.averaging.objective import Objective
from weightsmith.training.averaging.search import select

SELECT, EVERY = 10, 10
RANDOM_DRAWS, EMA_DECAYS, TWA_RATES = 20, (0.8, 0.9, 0.95, 0.98), (0.01, 0.03, 0.1, 0.3)
METHODS = (
    "last",
    "LAWA",
    "every",
    "random",
    "all",
    "EMA",
    "best",
    "greedy",
    "TWA",
    "SeWA train",
    "SeWA val",
    "SeWA val, polished",
)
Batches = list[tuple[Tensor, Tensor]]


class Size(NamedTuple):
    """How long everything runs.

    Attributes:
        steps: Training steps of a classifier.
        cloning: Training steps of a policy.
        candidates: States of a window.
        search: Iterations of SeWA.
        descent: Steps of TWA at each learning rate.
    """

    steps: int
    cloning: int
    candidates: int
    search: int
    descent: int


FULL = Size(2000, 4000, 100, 200, 200)
QUICK = Size(200, 200, 20, 10, 5)


def batches_of(x: Tensor, y: Tensor, size: int) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


# ---- classifier


def labelled(number: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Five classes by the largest of five random directions' quadratic forms, a share of labels wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 20, generator=generator)
    maps = torch.randn(5, 20, 6, generator=torch.Generator().manual_seed(12345))
    y = torch.einsum("nd,cdk->nck", x, maps).square().sum(-1).argmax(1)
    wrong = torch.rand(number, generator=generator) < noise
    return x, torch.where(wrong, torch.randint(0, 5, (number,), generator=generator), y)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def classifier(window: str, seed: int, size: Size) -> dict[str, Any]:
    """Train, collect a window, compare all methods on it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    x, y = labelled(2000, 0.3, 10 * seed + 1)
    generator = torch.Generator().manual_seed(seed)
    bank, bad, spoiled = MemoryBank(size.candidates), set(), -10
    chosen_bad = set(torch.randperm(size.candidates, generator=generator)[: size.candidates // 4].tolist())
    for step in range(size.steps):
        rows = torch.randint(0, 2000, (64,), generator=generator)
        labels = y[rows]
        if window == "natural" and torch.rand((), generator=generator) < 1 / 50:
            labels, spoiled = labels[torch.randperm(64, generator=generator)], step
        optimizer.zero_grad()
        classify(model, (x[rows], labels)).backward()
        optimizer.step()
        left = size.steps - 1 - step
        if left % EVERY == 0 and left < size.candidates * EVERY:
            number = size.candidates - 1 - left // EVERY
            if window == "corrupted" and number in chosen_bad:
                bad.add(step)
                bank.add(noisy(model, generator), step)
            else:
                bank.add(model, step)
                if step - spoiled < 3:
                    bad.add(step)
    # The last state of a corrupted window is whichever comes last, bad or not.
    test = labelled(4000, 0.0, 10 * seed + 3)

    def score() -> dict[str, float]:
        with torch.no_grad():
            return {
                "loss": float(classify(model, test)),
                "accuracy": float((model(test[0]).argmax(1) == test[1]).double().mean()),
            }

    train, val = batches_of(x, y, 256), batches_of(*labelled(500, 0.3, 10 * seed + 2), 250)
    return compare(model, bank, train, val, classify, score, seed, bad, size)


def noisy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with Gaussian noise of twice each tensor's standard deviation."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


# ---- behaviour cloning


def swing(
    policy: Callable[[Tensor], Tensor], starts: Tensor, noise: float, generator: torch.Generator
) -> Any:
    """Roll a pendulum out: states (T, B, 3), torques (T, B) and mean return per step; -1 at worst, 0
    upright.
    """
    angle, speed = starts[:, 0], starts[:, 1]
    states, torques, reward = [], [], torch.zeros(len(starts))
    for _ in range(150):
        state = torch.stack([angle.cos(), angle.sin(), speed / 8], 1)
        torque = policy(state).clamp(-2, 2)
        states.append(state)
        torques.append(torque)
        applied = (torque + noise * torch.randn(torque.shape, generator=generator)).clamp(-2, 2)
        off = torch.atan2(angle.sin(), angle.cos())
        reward -= (off.square() + 0.1 * speed.square() + 0.001 * applied.square()) / 16.27
        speed = (speed + (15 * angle.sin() + 3 * applied) * 0.05).clamp(-8, 8)
        angle = angle + speed * 0.05
    return torch.stack(states), torch.stack(torques), reward / 150


def teacher(gain: float) -> Callable[[Tensor], Tensor]:
    """Pump energy until near the top, then hold by feedback; a small gain pumps slowly."""

    def act(state: Tensor) -> Tensor:
        cos, sin, speed = state[:, 0], state[:, 1], state[:, 2] * 8
        angle = torch.atan2(sin, cos)
        energy = speed.square() / 6 + 5 * (cos - 1)
        pump = -gain * energy * torch.sign(speed + 1e-6)
        hold = -(12 * angle + 3 * speed)
        return torch.where((cos > 0.9) & (speed.abs() < 3), hold, pump).clamp(-2, 2)

    return act


def demonstrations(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Half of them by a good teacher, half by a mediocre one; both act with noise."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for gain, noise in ((2.0, 0.3), (0.25, 0.8)):
        states, torques, _ = swing(teacher(gain), starts_of(number // 2, generator), noise, generator)
        parts.append((states.flatten(0, 1), torques.flatten()))
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    order = torch.randperm(len(x), generator=generator)
    return x[order], y[order]


def starts_of(number: int, generator: torch.Generator) -> Tensor:
    angle = (2 * torch.rand(number, generator=generator) - 1) * math.pi
    return torch.stack([angle, 2 * torch.rand(number, generator=generator) - 1], 1)


def clone(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


def cloning(seed: int, size: Size) -> dict[str, Any]:
    """Clone the teachers, collect the tail, compare all methods by return."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = demonstrations(40, 100 + seed)
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(size.candidates)
    for step in range(size.cloning):
        rows = torch.randint(0, len(x), (128,), generator=generator)
        optimizer.zero_grad()
        clone(model, (x[rows], y[rows])).backward()
        optimizer.step()
        left = size.cloning - 1 - step
        if left % EVERY == 0 and left < size.candidates * EVERY:
            bank.add(model, step)

    def score() -> dict[str, float]:
        rollouts = torch.Generator().manual_seed(7)
        with torch.no_grad():
            _, _, reward = swing(lambda state: model(state)[:, 0], starts_of(100, rollouts), 0.0, rollouts)
        return {"loss": -float(reward.mean()), "return": float(reward.mean())}

    val = batches_of(*demonstrations(10, 500 + seed), 750)
    return compare(model, bank, batches_of(x, y, 600), val, clone, score, seed, set(), size)


# ---- all methods on one window


def compare(
    model: nn.Module,
    bank: MemoryBank,
    train: Batches,
    val: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    score: Callable[[], dict[str, float]],
    seed: int,
    bad: set[int],
    size: Size,
) -> dict[str, Any]:
    """Scores, share of bad states picked and passes of every method."""
    results: dict[str, Any] = {}
    number = len(bank)
    search = SeWAOptions(seed=seed, steps=size.search)

    def note(name: str, weights: Sequence[float], forward: int = 0, backward: int = 0) -> None:
        bank.mix(weights, model)
        picked = [step for step, weight in zip(bank.steps, weights, strict=True) if weight > 1e-9]
        results[name] = {
            **score(),
            "picked": picked,
            "bad": sum(step in bad for step in picked) / len(picked),
            "forward": forward,
            "backward": backward,
        }

    def choice(name: str, data: Batches | None = None, **options: Any) -> None:
        given = AveragingOptions(
            num_select=SELECT, num_candidates=number, seed=seed, batches=len(val), **options
        )
        found = select(given, bank, model, data, loss)
        note(name, found.weights, found.cost.get("forward", 0), found.cost.get("backward", 0))

    note("last", [float(index == number - 1) for index in range(number)])
    choice("LAWA", method="lawa")
    choice("every", method="every")
    draws = []
    for draw in range(RANDOM_DRAWS):
        options = AveragingOptions(method="random", num_select=SELECT, seed=1000 * seed + draw)
        note("random", select(options, bank).weights)
        draws.append(results["random"])
    results["random"] = {
        key: statistics.fmean(one[key] for one in draws) for key in draws[0] if key != "picked"
    }
    choice("all", method="uniform")
    with Objective(model, bank, val, loss) as objective:
        emas = [select(AveragingOptions(method="ema", decay=decay), bank).weights for decay in EMA_DECAYS]
        losses = [objective.score(weights, len(val)) for weights in emas]
        passes = objective.cost["forward"]
    note("EMA", emas[losses.index(min(losses))], passes)
    choice("best", val, method="best")
    choice("greedy", val, method="greedy")
    results["TWA"] = twa(model, bank, train, val, loss, score, size.descent)
    choice("SeWA train", train, method="sewa", sewa=search)
    choice("SeWA val", val, method="sewa", sewa=search)
    choice("SeWA val, polished", val, method="sewa", sewa=replace(search, polish=20))
    return results


def twa(
    model: nn.Module,
    bank: MemoryBank,
    train: Batches,
    val: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    score: Callable[[], dict[str, float]],
    steps: int,
) -> dict[str, Any]:
    """Projected SGD in the span of the candidates, `steps` at each of four learning rates, the best by
    held-out loss.
    """
    parameters = list(model.parameters())
    states = []
    for index in range(len(bank)):
        bank.mix([float(other == index) for other in range(len(bank))], model)
        states.append(nn.utils.parameters_to_vector(parameters).detach().clone())
    basis, _ = torch.linalg.qr(torch.stack(states).T)
    best: tuple[float, Tensor] | None = None
    for rate in TWA_RATES:
        point, velocity = torch.stack(states).mean(0), torch.zeros_like(states[0])
        for step in range(steps):
            nn.utils.vector_to_parameters(point, parameters)
            model.zero_grad()
            loss(model, train[step % len(train)]).backward()
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
            velocity = 0.9 * velocity + basis @ (basis.T @ gradient)
            point = point - rate * velocity
        nn.utils.vector_to_parameters(point, parameters)
        with torch.no_grad():
            value = statistics.fmean(float(loss(model, batch)) for batch in val)
        if math.isfinite(value) and (best is None or value < best[0]):
            best = (value, point)
    assert best is not None
    nn.utils.vector_to_parameters(best[1], parameters)
    passes = steps * len(TWA_RATES)
    return {**score(), "bad": math.nan, "forward": passes + len(val) * len(TWA_RATES), "backward": passes}


# ---- judgement


def column(runs: Sequence[Mapping[str, Any]], method: str, key: str) -> list[float]:
    return [run[method][key] for run in runs]


def better_by(runs: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> tuple[float, float]:
    """Mean over seeds by which our loss is lower, and its standard error."""
    gains = [b - a for a, b in zip(column(runs, ours, "loss"), column(runs, theirs, "loss"), strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return statistics.fmean(gains), error


def judge(windows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What was asked for, one by one."""
    ours, corrupted, clean = "SeWA val", windows["corrupted"], windows["clean"]
    cloned = windows["cloning"]
    checks = {
        "corrupted: less than 5 % bad states": statistics.fmean(column(corrupted, ours, "bad")) < 0.05,
    }
    for peer in ("LAWA", "every", "random"):
        gain, error = better_by(corrupted, ours, peer)
        checks[f"corrupted: better than {peer} by two standard errors"] = gain > 2 * error
    for peer in ("LAWA", "random"):
        checks[f"clean: at least as good as {peer}"] = better_by(clean, ours, peer)[0] >= 0
    checks["cloning: return at least LAWA's"] = better_by(cloned, ours, "LAWA")[0] >= 0
    checks["cloning: return above the last state's"] = better_by(cloned, ours, "last")[0] > 0
    if len(cloned) > 1:
        varies = {method: statistics.stdev(column(cloned, method, "return")) for method in (ours, "last")}
        checks["cloning: return varies less over seeds than the last state's"] = varies[ours] < varies["last"]
    held = sum(checks.values())
    core = all(value for name, value in checks.items() if name.startswith("corrupted"))
    verdict = "reproduced" if held == len(checks) else "weaker claim" if core else "not shown"
    return {"checks": checks, "verdict": verdict}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    windows, judgement = results["windows"], results["judgement"]
    lines = [
        "# SeWA: choosing states of a run",
        "",
        f"Seeds {', '.join(map(str, results['seeds']))}; {results['candidates']} candidates every {EVERY} "
        f"steps, {SELECT} averaged; mean ± sd over seeds. Made by `python evidence/sewa.py` in "
        f"{results['seconds'] / 60:.0f} minutes.",
        "",
        "Test loss on clean labels (accuracy), share of bad states among those picked, and the return of the "
        "cloned policy (0 is upright all the time):",
        "",
        "| | clean | corrupted | bad | natural | bad | return | passes forward, backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        cells = []
        for window in ("clean", "corrupted", "natural"):
            runs = windows[window]
            accuracy = statistics.fmean(column(runs, method, "accuracy"))
            cells.append(f"{spread(column(runs, method, 'loss'), 2)} ({100 * accuracy:.1f} %)")
            if window != "clean":
                share = statistics.fmean(column(runs, method, "bad"))
                cells.append("–" if math.isnan(share) else f"{100 * share:.0f} %")
        cells.append(spread(column(windows["cloning"], method, "return"), 4))
        first = windows["clean"][0][method]
        cells.append(f"{first['forward']:.0f}, {first['backward']:.0f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "| asked for | |", "|---|---|"]
    lines += [f"| {name} | {'holds' if held else 'does not'} |" for name, held in judgement["checks"].items()]
    lines += ["", f"**Verdict: {judgement['verdict']}.**", ""]
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> str:
    """Loss (or cost) over that of the last state, by window; a dot a seed, a bar their mean. As SVG."""
    shown = [method for method in METHODS if method != "last"]
    rows = {method: 52 + 20 * row for row, method in enumerate(shown)}
    foot = max(rows.values()) + 16
    body = []
    for place, (window, runs) in enumerate(results["windows"].items()):
        ratios = {method: [run[method]["loss"] / run["last"]["loss"] for run in runs] for method in shown}
        values = [value for group in ratios.values() for value in group]
        left = 130 + 185 * place
        scale = Scale(min(0.9, *values), max(1.1, *values), left, left + 160, log=True)
        body += [text(left, 20, window, "title"), line(scale(1), 32, scale(1), foot, "axis")]
        for value in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5):
            if scale.low <= value <= scale.high:
                body += [
                    line(scale(value), 32, scale(value), foot, "grid"),
                    text(scale(value), foot + 14, number(value), "small", "middle"),
                ]
        for method, y in rows.items():
            colour = "b" if method.startswith("SeWA") else "a"
            body += [dot(scale(value), y, 3.5, colour) for value in ratios[method]]
            body.append(box(scale(statistics.fmean(ratios[method])) - 1, y - 7, 2, 14, "ink"))
            if place == 0:
                body.append(text(120, y + 4, method, anchor="end"))
    body.append(
        text(130, foot + 32, "test loss, for cloning the cost of a rollout, over that of the last state")
    )
    return page(880, foot + 44, "SeWA and its peers on the same window of states", body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "one seed, short runs", seeds=[0, 1, 2, 3, 4])
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, size = ([0], QUICK) if chosen.quick else (chosen.seeds, FULL)
    begun = time.perf_counter()
    windows: dict[str, list[Any]] = {"clean": [], "corrupted": [], "natural": [], "cloning": []}
    for seed in seeds:
        for window in ("clean", "corrupted", "natural"):
            windows[window].append(classifier(window, seed, size))
        windows["cloning"].append(cloning(seed, size))
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s so far", flush=True)
    judgement = judge(windows)
    results = {
        "method": "sewa",
        "seeds": list(seeds),
        "candidates": size.candidates,
        "seconds": time.perf_counter() - begun,
        "environment": environment(),
        "verdict": judgement["verdict"],
        "judgement": judgement,
        "windows": windows,
    }
    plain = {name: [without_nan(run) for run in runs] for name, runs in windows.items()}
    publish("sewa", chosen, {**results, "windows": plain}, table(results), draw(results))


def without_nan(run: Mapping[str, Any]) -> dict[str, Any]:
    """NaN (no share of bad states can be given) as null."""
    return {
        method: {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in found.items()
        }
        for method, found in run.items()
    }


if __name__ == "__main__":
    main()
