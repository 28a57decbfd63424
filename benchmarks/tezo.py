"""Steps of TeZO against MeZO's, as a plain loop and as ours makes them, and against AdamW's gradients.

    python benchmarks/tezo.py [--rounds 9] [--layers 12] [--out benchmarks/results/tezo.json]

A transformer of width 512 on one row of 32 tokens. First every pair that should agree is checked to agree;
then all take turns, in one process on two threads (wall clock) and again on one thread (processor time), and
medians are printed: whole steps, and what a step costs beside its two forward passes. The targets are those
of a process on two cores. Peak memory is that of a process of its own for each (`VmHWM`), less that of one
that only runs forward.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from weightsmith.runs.environment import environment
from weightsmith.runs.memory import peak_rss_bytes, reset_peak
from weightsmith.training import MeZO, MeZOAdam, TeZO, TeZOAdam, memory_report

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEADS, VOCABULARY, TOKENS, RANK = 512, 8, 1000, 32, 32
THREADS = (2, 1)
Step = Callable[[], Any]


class Model(nn.Module):
    """Pre-norm transformer on one row of tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.ids = torch.randint(0, VOCABULARY, (1, TOKENS + 1))

    def forward(self) -> Tensor:
        """The loss."""
        hidden = self.embed(self.ids[:, :-1])
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden)[0], self.ids[0, 1:])


class PlainMeZO:
    """Plain formulation of the loop that most projects copy: four dense draws, temporaries of parameters."""

    def __init__(self, model: nn.Module, lr: float, *, adam: bool = False, rho: float = 1e-3) -> None:
        self.model, self.lr, self.rho, self.adam = model, lr, rho, adam
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters] if adam else []
        self.count = 0

    def perturb(self, scale: float) -> None:
        """Add `scale` times rho times the noise of the step."""
        torch.manual_seed(self.count)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype)
            p.data = p.data + scale * z * self.rho

    @torch.no_grad()
    def step(self) -> float:
        """Two probes and an update."""
        self.count += 1
        self.perturb(1)
        above = self.model().item()
        self.perturb(-2)
        below = self.model().item()
        self.perturb(1)
        kappa = (above - below) / (2 * self.rho)
        torch.manual_seed(self.count)
        for i, p in enumerate(self.parameters):
            gradient = kappa * torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype)
            if self.adam:
                m, v = self.moments[i]
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.99).add_(0.01 * gradient * gradient)
                low1, low2 = 1 - 0.9**self.count, 1 - 0.99**self.count
                gradient = (m / low1) / ((v / low2).sqrt() + 1e-8)
            p.data = p.data - self.lr * gradient
        return above


def ours(cls: Any, **options: Any) -> Callable[[Model], Step]:
    def make(model: Model) -> Step:
        optimizer = cls(model.named_parameters(), 1e-5, model=model, **options)
        return lambda: optimizer.step(model)

    return make


def plain(adam: bool) -> Callable[[Model], Step]:
    return lambda model: PlainMeZO(model, 1e-5, adam=adam).step


def adamw(model: Model) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    return step


def forward_twice(model: Model) -> Step:
    def step() -> None:
        with torch.no_grad():
            model()
            model()

    return step


CONTESTANTS: dict[str, Callable[[Model], Step]] = {
    "two forward passes": forward_twice,
    "plain formulation of MeZO": plain(False),
    "MeZO": ours(MeZO),
    "TeZO": ours(TeZO, rank=RANK),
    "TeZO, branch": ours(TeZO, rank=RANK, restore="branch"),
    "plain formulation of ZO-Adam": plain(True),
    "MeZO-Adam": ours(MeZOAdam),
    "TeZO-Adam": ours(TeZOAdam, rank=RANK),
    "TeZO-Adam, branch": ours(TeZOAdam, rank=RANK, restore="branch"),
    "AdamW with gradients": adamw,
}
TARGETS = (
    ("TeZO", "plain formulation of MeZO", 1 / 4),
    ("TeZO", "MeZO", 1 / 2),
    ("TeZO, branch", "MeZO", 1 / 2),
    ("TeZO-Adam", "plain formulation of ZO-Adam", 1 / 3),
    ("TeZO-Adam", "MeZO-Adam", 1 / 3),
    ("TeZO-Adam, branch", "MeZO-Adam", 1 / 3),
)


def agree() -> str:
    """Ours and the plain formulation take the same step along the same direction; branches do as moves do."""
    start = Model(1).double()
    plainly, apart = copy.deepcopy(start), copy.deepcopy(start)
    loop = PlainMeZO(plainly, 1e-3, adam=True)
    optimizer = MeZOAdam(apart.named_parameters(), 1e-3)
    with torch.no_grad():
        # The loop's own draws, put in the place of ours.
        torch.manual_seed(1)
        noise = {id(p): torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype) for p in apart.parameters()}
    for piece, _, parameter in optimizer._prepared().members:
        piece._blocks = lambda step, p=parameter: [(p.data, noise[id(p)].clone(), None)]  # type: ignore
    loop.step()
    optimizer.step(apart)
    for p, q in zip(plainly.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    made = []
    for restore in ("inplace", "branch"):
        model = copy.deepcopy(start)
        optimizer = TeZOAdam(model.named_parameters(), 1e-3, rank=8, model=model, restore=restore)
        for _ in range(3):
            optimizer.step(model)
        made.append(list(model.parameters()))
    for p, q in zip(*made, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    return "MeZO-Adam equal to the plain formulation to 1e-6, branches to moves to 1e-4 after 3 steps"


def peak_of(name: str, layers: int) -> int:
    """Peak memory of this process in three steps."""
    model = Model(layers)
    reset_peak()  # what imports held for a while is nobody's
    step = CONTESTANTS[name](model)
    for _ in range(3):
        step()
    return peak_rss_bytes()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tezo.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory_of:
        print(peak_of(options.memory_of, options.layers))
        return
    agreement = agree()
    print(f"same result: {agreement}", file=sys.stderr, flush=True)
    spent = {threads: in_turn(options.layers, options.rounds, threads) for threads in THREADS}
    torch.set_num_threads(1)
    names = list(CONTESTANTS)
    command = [sys.executable, __file__, "--layers", str(options.layers), "--memory-of"]
    peaks = {name: int(subprocess.check_output([*command, name]).split()[-1]) for name in names}
    base = Model(options.layers)
    state = {}
    for name, cls, more in (("MeZO-Adam", MeZOAdam, {}), ("TeZO-Adam", TeZOAdam, {"rank": RANK})):
        optimizer = cls(base.named_parameters(), 0.0, **more)
        optimizer.step(base)
        kept = memory_report(optimizer)
        state[name] = {"vectors": kept.vectors, "factors": kept.factors, "dense": kept.dense}
    results = {
        "machine": environment(),
        "weights": sum(p.numel() for p in base.parameters()),
        "rounds": options.rounds,
        "agreement": agreement,
        "seconds": {
            threads: {name: statistics.median(values) for name, values in taken.items()}
            for threads, taken in spent.items()
        },
        "peak_bytes": {name: peak - peaks[names[0]] for name, peak in peaks.items()},
        "state_bytes": state,
        "targets": [
            {"threads": threads, **target(taken, *wanted)}
            for threads, taken in spent.items()
            for wanted in TARGETS
        ],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    words = table(results)
    options.out.with_suffix(".md").write_text(words)
    print(words)


def in_turn(layers: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each contestant's steps in rounds in which all take turns; the first two don't count."""
    torch.set_num_threads(threads)
    # Threads that wait for each other spend processor time, too.
    clock = time.process_time if threads == 1 else time.perf_counter
    steps = {name: make(Model(layers)) for name, make in CONTESTANTS.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(-2, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begun = clock()
            steps[name]()
            if number >= 0:
                spent[name].append(clock() - begun)
    return spent


def target(spent: dict[str, list[float]], one: str, other: str, most: float) -> dict[str, Any]:
    """Ratio of what two steps cost beside their forward passes, by round."""
    passes = statistics.median(spent["two forward passes"])
    ratios = sorted((a - passes) / (b - passes) for a, b in zip(spent[one], spent[other], strict=True))
    inner = ratios[1:-1] if len(ratios) > 4 else ratios
    return {
        "ours": one,
        "theirs": other,
        "at_most": most,
        "ratio": statistics.median(ratios),
        "range": [inner[0], inner[-1]],
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    seconds = results["seconds"]
    lines = [
        f"{results['weights'] / 1e6:.0f} M weights, {TOKENS} tokens, rank {RANK}, one process, median of "
        f"{results['rounds']} rounds: wall clock on two threads, processor time on one. Same result: "
        f"{results['agreement']}.",
        "",
        "| | ms a step, two threads | beside two forward passes | one thread | beside | peak memory beside a "
        "forward pass |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONTESTANTS:
        shown = []
        for taken in seconds.values():
            beside = taken[name] - taken["two forward passes"]
            shown.append(f"{1000 * taken[name]:.0f} | {1000 * beside:.0f}")
        extra = max(results["peak_bytes"][name], 0) / 1e6
        lines.append(f"| {name} | {' | '.join(shown)} | {extra:.0f} MB |")
    lines += ["", "| ratio of costs beside the passes | threads | median | range | target | |"]
    lines += ["|---|---|---|---|---|---|"]
    for found in results["targets"]:
        held = "holds" if found["ratio"] <= found["at_most"] else "missed"
        low, high = found["range"]
        lines.append(
            f"| {found['ours']} / {found['theirs']} | {found['threads']} | {found['ratio']:.2f} "
            f"| {low:.2f} .. {high:.2f} | {found['at_most']:.2f} at most | {held} |"
        )
    tezo, mezo = results["state_bytes"]["TeZO-Adam"], results["state_bytes"]["MeZO-Adam"]
    lines += [
        "",
        f"State of matrices: TeZO-Adam {tezo['vectors'] / 1e3:.0f} kB of vectors and "
        f"{tezo['factors'] / 1e6:.1f} MB of factors; MeZO-Adam {mezo['dense'] / 1e6:.0f} MB.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
