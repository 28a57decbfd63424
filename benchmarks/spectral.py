"""TSV-M on one matrix: ours against a plain formulation of the public algorithm, in one process.

    python benchmarks/spectral.py [--rounds 7] [--quick] [--out benchmarks/results/spectral.json]

The plain formulation does what the public code of arXiv:2412.00081 does: a full SVD of every task's change,
the top q / T triplets of each side by side, polar factors by two more full SVDs, one chain of products. Both
get the same fp32 tensors and the same number of threads, take turns, and must agree before anything is timed.
Two loads:

    matrix    one matrix at a time, on all cores each
    layer     the seven matrices of a Llama block, as the engine runs them (one thread each, one worker a
    core)
              against one after the other on all cores, as the public code does
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from weightsmith.merging.methods.tsvm import tsvm
from weightsmith.runs import write_json
from weightsmith.tensors.spectra import one_thread

TASKS = 3
SHAPES = {"square": (768, 768), "wide": (768, 2048), "larger": (1024, 2816)}
BLOCK = {"hidden": 1024, "inner": 2816, "keys": 256}
QUICK_SHAPES = {"square": (128, 128), "wide": (128, 352)}
QUICK_BLOCK = {"hidden": 128, "inner": 352, "keys": 64}
# Both are exact up to fp32: singular vectors next to the cut and short combinations carry its rounding
# furthest.
AGREE = 1e-3


def plain(deltas: Tensor) -> Tensor:
    """The change to one matrix, by full SVDs; (T, M, N) -> (M, N)."""
    tasks, q = len(deltas), min(deltas.shape[1:])
    kept = q // tasks
    us, ss, vs = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :kept])
        ss.append(s[:kept])
        vs.append(vh[:kept])
    left, _, left_turn = torch.linalg.svd(torch.cat(us, dim=1), full_matrices=False)
    right_turn, _, right = torch.linalg.svd(torch.cat(vs, dim=0), full_matrices=False)
    return torch.linalg.multi_dot((left, left_turn, torch.diag(torch.cat(ss)), right_turn, right))


def changes(shape: tuple[int, int], spectrum: str, seed: int) -> Tensor:
    """Changes of tasks: noise ("flat"), or with strong directions on top ("steep")."""
    generator = torch.Generator().manual_seed(seed)
    deltas = torch.randn(TASKS, *shape, generator=generator) * 1e-4
    if spectrum == "steep":
        strength = torch.arange(1, 33).float() ** -0.7
        left = torch.randn(TASKS, shape[0], 32, generator=generator) * strength
        deltas += left @ torch.randn(TASKS, 32, shape[1], generator=generator) * 5e-4
    return deltas


def block(sizes: dict[str, int], seed: int) -> list[Tensor]:
    """Changes to the seven matrices of a Llama block."""
    hidden, inner, keys = sizes["hidden"], sizes["inner"], sizes["keys"]
    shapes = [(hidden, hidden)] * 2 + [(keys, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    return [changes(shape, "flat", seed + place) for place, shape in enumerate(shapes)]


def engine_way(layer: list[Tensor], workers: int) -> list[Tensor]:
    """Matrices on workers, one thread each, largest first."""

    def one(deltas: Tensor) -> Tensor:
        with one_thread():
            return tsvm(deltas)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, sorted(layer, key=lambda deltas: -deltas.numel())))


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median seconds of both and the median of their ratio over interleaved rounds, with its range."""

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    ours(), theirs()  # warm up: allocator, thread pool
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = sorted(slow / fast for fast, slow in times)
    return {
        "ours_seconds": statistics.median(fast for fast, _ in times),
        "plain_seconds": statistics.median(slow for _, slow in times),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def measure(rounds: int, quick: bool) -> dict[str, object]:
    """All loads, printed as they come."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    found: dict[str, dict[str, object]] = {}

    def record(name: str, far: float, times: dict[str, float]) -> None:
        if not far < AGREE:
            raise SystemExit(f"{name}: the two disagree by {far:.1e} of the result, {AGREE:.0e} is allowed")
        found[name] = {"relative_difference": far, **times}
        spread = f"{times['ratio']:.2f}x ({times['ratio_low']:.2f} .. {times['ratio_high']:.2f})"
        print(
            f"{name:<28} {times['ours_seconds']:.3f} s  {times['plain_seconds']:.3f} s  {spread}", flush=True
        )

    for name, shape in (QUICK_SHAPES if quick else SHAPES).items():
        for spectrum in ("flat", "steep"):
            deltas = changes(shape, spectrum, 0)
            far = distance(tsvm(deltas), plain(deltas))
            times = paired(lambda d=deltas: tsvm(d), lambda d=deltas: plain(d), rounds)
            record(f"matrix {name} {shape[0]}x{shape[1]} {spectrum}", far, times)
    layer = block(QUICK_BLOCK if quick else BLOCK, 100)
    largest_first = sorted(layer, key=lambda deltas: -deltas.numel())
    far = max(map(distance, engine_way(layer, cores), map(plain, largest_first)))
    times = paired(lambda: engine_way(layer, cores), lambda: [plain(d) for d in layer], rounds)
    record(f"layer on {cores} cores", far, times)
    return {
        "what": "TSV-M, seconds and ratio of a plain formulation of the public algorithm to ours",
        "tasks": TASKS,
        "rounds": rounds,
        "threads": cores,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "results": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    result = measure(options.rounds, options.quick)
    if options.out:
        write_json(options.out, result)
    else:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
