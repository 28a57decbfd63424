"""Merges of Llama-shaped checkpoints: Weightsmith against mergekit, as whole commands.

    python benchmarks/merge.py [--sizes 0.4B,1B] [--methods linear,ties,...] [--rounds 3,1]
                               [--folder DIR] [--out benchmarks/results/merge.json]

What is measured replaces its own rows of the results; other rows stay.

Makes one base and three fine-tunes in bfloat16 (random weights of std 0.02, changes of std 5e-4), writes
one page of mergekit's for each method and gives it to both programs, in turns, inputs in the page cache.
`dtype: float32` makes both compute in float32, `out_dtype: bfloat16` makes both write bfloat16. Time and
peak memory (`ru_maxrss`; for ours that of its worker processes is added) are those of whole commands,
start-up included. The written tensors are compared first. `cp -r` of the same inputs is timed beside them:
what reading and writing alone costs.

The process that measures imports nothing but the standard library: a child's `ru_maxrss` starts at its
parent's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / ".venv" / "bin" / "weightsmith"
THEIRS = ROOT / ".venv-peers" / "bin" / "mergekit-yaml"

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 512},
    "0.4B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 17, "vocab_size": 32000},
}
THREE = ("m1", "m2", "m3")


@dataclass(frozen=True)
class Job:
    """What both programs do under one method's name.

    Attributes:
        models: Those merged.
        parameters: On the page, for all of them.
        base: Whether the page names the base.
        agreement: What the outputs have to share, a key of `AGREEMENT`.
    """

    models: tuple[str, ...] = THREE
    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool = True
    agreement: str = "places"

    @property
    def read(self) -> list[str]:
        """Folders that are read, the base first."""
        return (["base"] if self.base else []) + [name for name in self.models if name != "base"]

    def page(self, method: str, inputs: Path) -> dict[str, Any]:
        """The page both programs get."""
        page: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(inputs / name)} for name in self.models],
            "parameters": self.parameters,
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        return page | ({"base_model": str(inputs / "base")} if self.base else {})


JOBS = {
    "linear": Job(parameters={"weight": 1.0}, base=False),
    "ties": Job(parameters={"weight": 1.0, "density": 0.2}, agreement="selection"),
    "dare_ties": Job(parameters={"weight": 1.0, "density": 0.5}, agreement="law"),
    "dare_linear": Job(parameters={"weight": 1.0, "density": 0.5}, agreement="law"),
    "della": Job(parameters={"weight": 1.0, "density": 0.5, "epsilon": 0.15}, agreement="law"),
    "della_linear": Job(parameters={"weight": 1.0, "density": 0.5, "epsilon": 0.15}, agreement="law"),
    "breadcrumbs": Job(parameters={"weight": 1.0, "density": 0.5, "gamma": 0.01}, agreement="selection"),
    "breadcrumbs_ties": Job(parameters={"weight": 1.0, "density": 0.5, "gamma": 0.01}, agreement="selection"),
    "task_arithmetic": Job(parameters={"weight": 0.4}),
    "model_stock": Job(agreement="angles"),
    "sce": Job(parameters={"select_topk": 0.5}, agreement="selection"),
    "ram": Job(parameters={"epsilon": 1e-4}, agreement="selection"),
    "ramplus_tl": Job(parameters={"epsilon": 1e-4}, agreement="selection"),
    "slerp": Job(models=("base", "m1"), parameters={"t": 0.4}),
    "nuslerp": Job(models=("m1", "m2"), parameters={"weight": 1.0}, base=False, agreement="angles"),
    "multislerp": Job(parameters={"weight": 1.0}, base=False, agreement="angles"),
    "karcher": Job(base=False),
    "nearswap": Job(models=("m1",), parameters={"t": 5e-4}),
    "arcee_fusion": Job(models=("m1",), agreement="shapes"),
    "passthrough": Job(models=("m1",), base=False),
}
AGREEMENT = {
    "places": "equal, but for the last bfloat16 place (or what float32 rounds) in at most 1 of 1,000 "
    "entries: sums are rounded in another order",
    "angles": "equal, but for the last bfloat16 place in at most 1 of 1,000 entries; in tensors of more than "
    "16 M entries within the last place, but for 1 of 1,000: mergekit sums their lengths in float32, which "
    "falls 0.2 % short for 33 M, and turns by another angle",
    "selection": "equal to the last bfloat16 place, outside entries at the threshold that one keeps and the "
    "other doesn't (mergekit's unstable sort keeps any of equal magnitude): at most 1 of 20",
    "shapes": "shapes alone: of rows as near as these mergekit's divergence is what float32 rounds, so each "
    "keeps other entries",
    "law": "random: mean magnitude of the change within 1 % and share of changed entries within 0.01",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="0.4B,1B")
    parser.add_argument("--methods", default=",".join(JOBS))
    parser.add_argument("--rounds", default="3,1", help="one number a size")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--folder", type=Path, default=cache / "weightsmith" / "benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "merge.json")
    options = parser.parse_args()
    if not THEIRS.exists():
        sys.exit(f"{THEIRS} is missing: `make peers` installs mergekit")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    found = {(result["size"], result["method"]): result for result in known}
    results: list[dict[str, Any]] = []
    for size, rounds in zip(options.sizes.split(","), options.rounds.split(","), strict=True):
        for method in options.methods.split(","):
            found[size, method] = compete(options.folder, size, method, int(rounds))
            # Written after each: an hour of rounds should not be lost to the last one.
            results = [found[key] for key in itertools.product(SIZES, JOBS) if key in found]
            options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
            options.out.with_suffix(".md").write_text(f"{table(results)}\n{agreements(results)}")
    print(table(results))


def compete(folder: Path, size: str, method: str, rounds: int) -> dict[str, Any]:
    """All rounds of one method at one size."""
    inputs = folder / size
    helper("make", str(inputs), json.dumps(SIZES[size]))
    job = JOBS[method]
    read = [inputs / name for name in job.read]
    page = inputs / f"{method}.yml"
    page.write_text(json.dumps(job.page(method, inputs)))  # JSON is YAML
    commands = {
        "weightsmith": [str(OURS), "merge", str(page), str(inputs / "ours"), "--json"],
        "mergekit": [str(THEIRS), str(page), str(inputs / "theirs"), "--quiet"],
        "cp -r": ["cp", "-r", *map(str, read), str(inputs / "copy")],
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    agreement: dict[str, Any] = {}
    written = 0
    warm(read)
    clean(inputs)
    said = subprocess.run([*commands["weightsmith"], "--check"], stdout=subprocess.PIPE, check=True).stdout
    prediction = json.loads(said)["prediction"]
    turns = [name for _ in range(rounds) for name in ("weightsmith", "mergekit")]
    # Copies last: of large models they write more than the kernel lets wait in memory, and the disk is busy
    # with them for longer than `sync` says.
    for name in turns + ["cp -r"] * rounds:
        if name == "cp -r":
            (inputs / "copy").mkdir()
        warm(read)
        runs[name].append(measured(commands[name]))
        print(f"{size} {method} {name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        if name == "mergekit" and not agreement:
            agreement = json.loads(helper("compare", job.agreement, str(inputs)))
            written = sum(file.stat().st_size for file in (inputs / "ours").iterdir())
            if not agreement["agrees"]:
                sys.exit(f"{size} {method}: the outputs differ: {agreement}")
        # At once, so that most of it never reaches the disk, which later runs would find busy.
        if agreement:
            clean(inputs)
    result = summary(size, method, runs, agreement)
    return result | {"prediction": against(prediction, result, written)}


def clean(inputs: Path) -> None:
    for left in ("ours", "theirs", "copy"):
        shutil.rmtree(inputs / left, ignore_errors=True)


def summary(size: str, method: str, runs: dict[str, list[dict[str, Any]]], agreement: Any) -> dict[str, Any]:
    """Medians, ratios with their range, peak memory."""
    ratios = sorted(
        theirs["seconds"] / ours["seconds"]
        for ours, theirs in zip(runs["weightsmith"], runs["mergekit"], strict=True)
    )
    median = {name: statistics.median(run["seconds"] for run in made) for name, made in runs.items()}
    memory = {name: max(run["memory_bytes"] for run in made) for name, made in runs.items()}
    inside = statistics.median(run["merge_seconds"] for run in runs["weightsmith"])
    return {
        "size": size,
        "method": method,
        "page": JOBS[method].parameters | {"dtype": "float32", "out_dtype": "bfloat16"},
        "config": SIZES[size],
        "rounds": len(ratios),
        "seconds": median,
        "merge_seconds": inside,
        "speedup": statistics.median(ratios),
        "speedup_range": [ratios[0], ratios[-1]],
        "merge_over_copy": inside / median["cp -r"],
        "memory_bytes": memory,
        "memory_ratio": memory["mergekit"] / memory["weightsmith"],
        "agreement": agreement | {"tolerance": AGREEMENT[JOBS[method].agreement]},
        "runs": runs,
    }


def against(prediction: dict[str, float], result: dict[str, Any], written: int) -> dict[str, Any]:
    """What `--check` had said, and what then happened divided by it."""
    return prediction | {
        "seconds_ratio": result["merge_seconds"] / prediction["seconds"],
        "memory_ratio": result["memory_bytes"]["weightsmith"] / prediction["memory_bytes"],
        "disk_exact": written == prediction["disk_bytes"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| size | method | Weightsmith | mergekit | faster | memory | mergekit's | less | merge / `cp -r` "
        "| took / predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        low, high = result["speedup_range"]
        memory = {name: f"{size / 1e6:.0f} MB" for name, size in result["memory_bytes"].items()}
        lines.append(
            f"| {result['size']} | `{result['method']}` | {result['seconds']['weightsmith']:.1f} s "
            f"| {result['seconds']['mergekit']:.1f} s | {result['speedup']:.1f}x ({low:.1f}-{high:.1f}) "
            f"| {memory['weightsmith']} | {memory['mergekit']} | {result['memory_ratio']:.0f}x "
            f"| {result['merge_over_copy']:.2f} | {result['prediction']['seconds_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def agreements(results: list[dict[str, Any]]) -> str:
    """What the two outputs had in common, as Markdown."""
    lines = ["| size | method | what must agree | found, in the worst tensor |", "|---|---|---|---|"]
    for result in results:
        found = result["agreement"]
        if "worst magnitude" in found:
            magnitude, changed = found["worst magnitude"], found["worst changed"]
            says = f"mean magnitude {100 * magnitude:.1f} % apart, share of changed entries {changed:.4f}"
        elif "worst differing" in found:
            says = f"{1000 * found['worst differing']:.3g} of 1,000 entries differ"
        else:
            says = f"the shapes of {found['tensors']} tensors"
        lines.append(f"| {result['size']} | `{result['method']}` | {found['tolerance']} | {says} |")
    return "\n".join(lines) + "\n"


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of a whole process, and the seconds it says the merge itself took."""
    os.sync()  # what earlier runs left to write is not this one's
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
    ) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if child.returncode:
        sys.exit(f"{' '.join(command)} left with {child.returncode}")
    run = {"seconds": seconds, "memory_bytes": usage.ru_maxrss * 1024}
    if "--json" in command:  # ours: `ru_maxrss` leaves out what the worker processes hold
        report = json.loads(said)
        run |= {"merge_seconds": report["seconds"], "memory_bytes": report["memory_bytes"]}
    return run


def environment() -> dict[str, str]:
    """The same for all: offline, and as many threads as they like."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    kept = {key: value for key, value in os.environ.items() if key not in threads}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def warm(folders: list[Path]) -> None:
    """Read every input once, so that it lies in the page cache."""
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def helper(*arguments: str) -> str:
    """Run a part of this file that needs numpy in a process of its own; returns what it prints."""
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "python", ROOT / "benchmarks" / "merge_inputs.py", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def machine() -> dict[str, Any]:
    """What the numbers were made with."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as facts:
        names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    versions = [
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for python, code in (
            (
                ROOT / ".venv/bin/python",
                "import numpy, weightsmith as w; print(w.__version__, numpy.__version__)",
            ),
            (
                ROOT / ".venv-peers/bin/python",
                "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))",
            ),
        )
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "weightsmith": versions[0][0],
        "numpy": versions[0][1],
        "mergekit": versions[1][0],
        "torch (mergekit's)": versions[1][1],
        "threads": "one worker process a core; mergekit as it comes",
    }


if __name__ == "__main__":
    main()
