"""Parts of a training step on a Llama-shaped model of 124 M weights, against what people use now.

    python benchmarks/training_parts.py [--sections clip,optimizers,...] [--processes 5] [--rounds 5]
                                        [--layers 12] [--out benchmarks/results/training_parts.json]

Each section takes contestants that do the same job, checks first that they compute the same, then runs them
in turns on the same tensors and prints the median of each and the ratios of rounds, over several processes:
where memory comes to lie makes whoever needs much of it twice as slow in one process as in the next. Peak
memory is that of a
process of its own for each contestant (`VmHWM`, minus that of one that only holds the weights and
gradients). One thread.

Sections are in `training_clip.py`, `training_sharpness.py` and `training_decay_average.py`. Named peers come
from `.venv-peers` (`make peers`) or the folder `--peers`; a peer that no registry has is written plainly and
called so. A run of some sections keeps the results of the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"pytorch_optimizer": "pytorch-optimizer", "weightwatcher": "weightwatcher"}
"""Modules and what registries call them."""
os.environ.setdefault("OMP_NUM_THREADS", "1")
LARGE_BYTES = 32_000_000
"""Just under the largest size that glibc takes from its heap."""


@dataclass(frozen=True)
class Contestant:
    """One way to do a section's job.

    Attributes:
        name: As printed.
        make: Called once with the parameters; returns what is timed.
    """

    name: str
    make: Callable[[list[Any]], Callable[[], Any]]


@dataclass(frozen=True)
class Section:
    """A job, who does it, who the others are compared with, and the targets.

    Attributes:
        name: As in `--sections`.
        title: As printed.
        contestants: The first is what the ratios are to, unless a target names another.
        agree: Raises when the contestants don't compute the same.
        prepare: Called before every timed call, untimed.
        targets: (ours, theirs, the largest ratio of their times that holds the target).
        parameters: Makes the parameters with gradients.
    """

    name: str
    title: str
    contestants: Sequence[Contestant]
    agree: Callable[[], str]
    prepare: Callable[[list[Any], int], None]
    targets: Sequence[tuple[str, str, float]] = field(default_factory=tuple)
    parameters: Callable[[int], list[Any]] | None = None


def llama_shapes(
    layers: int, hidden: int = 768, width: int = 2560, vocabulary: int = 32000
) -> list[tuple[int, ...]]:
    """Shapes of a Llama with tied embeddings: 124 M weights with 12 layers."""
    block: list[tuple[int, ...]] = [(hidden, hidden)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]
    return [(vocabulary, hidden), *[*block, (hidden,), (hidden,)] * layers, (hidden,)]


def parameters_with_gradients(layers: int) -> list[Any]:
    """Random weights and gradients."""
    import torch

    torch.manual_seed(0)
    made = []
    for shape in llama_shapes(layers):
        parameter = torch.nn.Parameter(0.02 * torch.randn(shape))
        parameter.grad = torch.randn(shape)
        made.append(parameter)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sections", help="names, by default all")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="in each process")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", choices=["time", "memory"], help="keep the other from earlier results")
    parser.add_argument("--peers", type=Path, help="folder with the peers' packages")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "training_parts.json")
    parser.add_argument("--time-of", metavar="SECTION", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, metavar=("SECTION", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).parent))
    peers = [options.peers] if options.peers else (ROOT / ".venv-peers").glob("lib/python*/site-packages")
    sys.path += [str(path) for path in peers]  # last: only what our own environment lacks
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            sys.exit(f"{name} is missing: `make peers` installs it")
    import torch

    torch.set_num_threads(1)
    # What any forward pass does: glibc raises its thresholds to the largest block freed so far. With low ones
    # it hands memory back to the system and takes it again within a step, and whom that hits is chance.
    torch.ones(LARGE_BYTES, dtype=torch.uint8)
    sections = {section.name: section for section in all_sections(options.layers)}
    if options.time_of:
        print(json.dumps(times_of(sections[options.time_of], options)))
        return
    if options.memory_of:
        print(peak_of(sections[options.memory_of[0]], options.memory_of[1], options.layers))
        return
    chosen = options.sections.split(",") if options.sections else list(sections)
    known = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    found = {result["section"]: result for result in known}
    for name in chosen:
        if options.only != "memory":
            found[name] = compete(sections[name], options) | {
                "memory_bytes": found.get(name, {}).get("memory_bytes", {})
            }
        if options.only != "time":
            found[name]["memory_bytes"] = measure_memory(sections[name], options)
        print(table([found[name]]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = [found[name] for name in sections if name in found]
    options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(results))


def all_sections(layers: int) -> Iterable[Section]:
    """Sections of the modules beside this one, in the order of the results."""
    for module in ("training_clip", "training_sharpness", "training_decay_average"):
        yield from importlib.import_module(module).sections(layers)


def compete(section: Section, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of a section in all processes."""
    command = [*child(options), "--rounds", str(options.rounds), "--time-of", section.name]
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in section.contestants}
    found: dict[str, Any] = {}
    for _ in range(options.processes):
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        for name, values in found.pop("seconds").items():
            seconds[name] += values
    print(f"{section.name}: same result: {found['agreement']}", file=sys.stderr, flush=True)
    return {
        "section": section.name,
        "title": section.title,
        "processes": options.processes,
        "rounds": options.rounds,
        **found,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "targets": [
            {"ours": ours, "theirs": theirs, "at_most": limit, **ratio(seconds[ours], seconds[theirs])}
            for ours, theirs, limit in section.targets
        ],
        "all": seconds,
    }


def times_of(section: Section, options: argparse.Namespace) -> dict[str, Any]:
    """The rounds of a section in this process."""
    agreement = section.agree()
    parameters = (section.parameters or parameters_with_gradients)(options.layers)
    timed = [(contestant.name, contestant.make(parameters)) for contestant in section.contestants]
    seconds: dict[str, list[float]] = {name: [] for name, _ in timed}
    for number in range(-2, options.rounds):  # two rounds to warm up: state, allocator
        # Every round starts with another, so that none always follows the same one.
        turn = number % len(timed)
        for name, call in timed[turn:] + timed[:turn]:
            section.prepare(parameters, number)
            begun = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return {
        "weights": sum(parameter.numel() for parameter in parameters),
        "tensors": len(parameters),
        "agreement": agreement,
        "seconds": seconds,
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Median of ours over theirs by round, and the range without the outermost tenths."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    inner = ratios[len(ratios) // 10 : len(ratios) - len(ratios) // 10]
    return {"ratio": statistics.median(ratios), "range": [inner[0], inner[-1]]}


def child(options: argparse.Namespace) -> list[str]:
    """The command of a process of its own."""
    peers = ["--peers", str(options.peers)] if options.peers else []
    return [sys.executable, __file__, "--layers", str(options.layers), *peers]


def measure_memory(section: Section, options: argparse.Namespace) -> dict[str, int]:
    """Peak memory beyond weights and gradients, one process for each contestant."""
    peaks = {
        name: int(subprocess.check_output([*child(options), "--memory-of", section.name, name]).split()[-1])
        for name in ["", *(contestant.name for contestant in section.contestants)]
    }
    return {name: peak - peaks[""] for name, peak in peaks.items() if name}


def peak_of(section: Section, name: str, layers: int) -> int:
    """Peak memory of this process in three calls of one contestant."""
    from weightsmith.runs.memory import peak_rss_bytes, reset_peak

    parameters = (section.parameters or parameters_with_gradients)(layers)
    section.prepare(parameters, 0)
    reset_peak()  # what imports held for a while is nobody's
    for contestant in section.contestants:
        if contestant.name == name:
            call = contestant.make(parameters)
            for number in range(3):
                section.prepare(parameters, number)
                call()
    return peak_rss_bytes()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from importlib.metadata import version

    from weightsmith.runs.environment import environment

    return {**environment(), "threads": 1, "peers": {name: version(name) for name in PEERS.values()}}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = []
    for result in results:
        lines += [
            f"<!-- {result['section']} -->",
            f"### {result['title']}",
            "",
            f"{result['weights'] / 1e6:.0f} M weights in {result['tensors']} tensors, median of "
            f"{result['processes']} processes of {result['rounds']} rounds; "
            f"same result: {result['agreement']}.",
            "",
        ]
        memory = result["memory_bytes"]
        extra = (" memory beside weights and gradients |", "---|") if memory else ("", "")
        lines += [f"| | ms |{extra[0]}", f"|---|---|{extra[1]}"]
        for name, seconds in result["seconds"].items():
            shown = f" {max(memory[name], 0) / 1e6:.0f} MB |" if memory else ""
            lines.append(f"| {name} | {1000 * seconds:.1f} |{shown}")
        lines.append("")
        if result["targets"]:
            lines += ["| ratio of times | median | range | target | |", "|---|---|---|---|---|"]
        for target in result["targets"]:
            held = "holds" if target["ratio"] <= target["at_most"] else "missed"
            low, high = target["range"]
            lines.append(
                f"| {target['ours']} / {target['theirs']} | {target['ratio']:.2f} | {low:.2f} .. {high:.2f} "
                f"| {target['at_most']:.3g} at most | {held} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
