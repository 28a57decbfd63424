"""Peak memory of every merge method on a Llama-shaped model of 3 B parameters, against our limits.

    python benchmarks/merge_memory.py [--size 3B | 3B-layer | small] [--methods all] [--folder DIR]
                                      [--keep-inputs] [--out benchmarks/results/merge_memory.json]

What is measured replaces its own rows of the results; other rows stay.

Makes a base and two fine-tunes in bfloat16: one block of random numbers, repeated through all tensors at a
length that no row divides, so that making them costs what writing does and matrices still have full rank.
`3B-layer` is one layer of it: matrices of the same sizes, and so the peak of spectral methods sooner. Each
method then merges them as a whole command. Three numbers are kept: `ru_maxrss` of the command itself,
what the command reports with its worker processes, and the largest sum of proportional set sizes of all its
processes that a look every tenth of a second found. The limit holds for the largest of them: 0.3 GB for
methods on tiles, 3 GB for those on whole matrices. Nothing is timed, so other programs may run beside it.
Methods that need statistics are left out: those alone would take 25 GB of disk. Outputs are deleted after
each method, inputs in the end.

The process that measures imports nothing but the standard library: a child's `ru_maxrss` starts at its
parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
LIMITS = {False: 0.3e9, True: 3.0e9}
SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2000},
    "0.4B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 32000},
    "3B-layer": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 320},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 26, "vocab_size": 32000},
}
MODELS = ("base", "m1", "m2")
BLOCK = 4_194_301  # a prime
# WUDI's 300 steps would take days and hold what one step holds.
OPTIONS: dict[str, dict[str, Any]] = {"slerp": {"t": 0.4}, "emr": {"task": 1}, "wudi": {"steps": 2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="3B", choices=SIZES)
    parser.add_argument("--methods", default="all", help="names with commas between")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--folder", type=Path, default=cache / "weightsmith" / "benchmarks" / "memory")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "merge_memory.json")
    parser.add_argument("--keep-inputs", action="store_true", help="for the next run")
    options = parser.parse_args()
    methods = json.loads(helper("methods"))
    if options.methods != "all":
        names = options.methods.split(",")
        unknown = [name for name in names if name not in methods]
        if unknown:
            sys.exit(f"--methods: no method `{unknown[0]}` without statistics; known: {', '.join(methods)}")
        methods = {name: methods[name] for name in names}
    inputs = options.folder / options.size
    helper("make", str(inputs), json.dumps(SIZES[options.size]))
    known = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    results = {(result["size"], result["method"]): result for result in known}
    new = []
    try:
        for name, facts in methods.items():
            new.append({"size": options.size, **measured(name, facts, inputs)})
            results[options.size, name] = new[-1]
            print(line(new[-1]), file=sys.stderr, flush=True)
            rows = [results[key] for key in sorted(results)]
            report = {"sizes": SIZES, "machine": machine(), "results": rows}
            report |= {"limits": {"tiles": LIMITS[False], "matrices": LIMITS[True]}}
            # Written after each: an hour of merges should not be lost to the last one.
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n")
            options.out.with_suffix(".md").write_text(table(rows))
    finally:
        shutil.rmtree(inputs / "out", ignore_errors=True)
        if not options.keep_inputs:
            shutil.rmtree(inputs, ignore_errors=True)
    print(table(new))
    over = [result["method"] for result in new if not result["within"]]
    if over:
        sys.exit(f"over the limit: {', '.join(over)}")


def measured(method: str, facts: dict[str, Any], inputs: Path) -> dict[str, Any]:
    """One merge as a whole command."""
    models = [str(inputs / name) for name in MODELS[1:][: facts["models"]]]
    page: dict[str, Any] = {"method": method, "models": models, **OPTIONS.get(method, {})}
    if facts["takes_base"]:
        page["base"] = str(inputs / "base")
    file, out = inputs / "page.yml", inputs / "out"
    file.write_text(json.dumps(page))  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    code = "from weightsmith.cli.main import main; main()"
    command = [str(PYTHON), "-c", code, "merge", str(file), str(out), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        seen, over = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(child.pid, seen, over))
        watcher.start()
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        watcher.join()
    if child.returncode:
        sys.exit(f"{method}: the command left with {child.returncode}")
    shutil.rmtree(out)
    found = {
        "ru_maxrss": usage.ru_maxrss * 1024,
        "reported": json.loads(said)["memory_bytes"],
        "sum_of_pss": seen[0],
    }
    return {
        "method": method,
        "matrices": facts["spectral"],
        "models": len(models),
        "memory_bytes": found,
        "limit": LIMITS[facts["spectral"]],
        "within": max(found.values()) <= LIMITS[facts["spectral"]],
    }


def watch(pid: int, seen: list[int], over: threading.Event) -> None:
    """Keep in `seen` the largest sum of proportional set sizes of a process and its descendants."""
    while not over.wait(0.1):
        total, waiting = 0, [pid]
        while waiting:
            one = waiting.pop()
            try:
                waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
                facts = Path(f"/proc/{one}/smaps_rollup").read_text()
            except OSError:  # it has ended
                continue
            total += sum(int(row.split()[1]) * 1024 for row in facts.splitlines() if row.startswith("Pss:"))
        seen[0] = max(seen[0], total)


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| size | method | works on | `ru_maxrss` | with workers | sum of PSS | limit | within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        sizes = [f"{size / 1e6:.0f} MB" for size in [*result["memory_bytes"].values(), result["limit"]]]
        kind = "matrices" if result["matrices"] else "tiles"
        within = "yes" if result["within"] else "**no**"
        lines.append(f"| {result['size']} | `{result['method']}` | {kind} | {' | '.join(sizes)} | {within} |")
    return "\n".join(lines) + "\n"


def line(result: dict[str, Any]) -> str:
    """One result for the eye."""
    largest, limit = max(result["memory_bytes"].values()) / 1e6, result["limit"] / 1e6
    return f"{result['method']}: {largest:.0f} MB of {limit:.0f}"


def machine() -> dict[str, Any]:
    """What the numbers were made with."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": json.loads(helper("versions")),
    }


def helper(*arguments: str) -> str:
    """Run a part of this file that needs more than the standard library in a process of its own."""
    command = [str(PYTHON), __file__, "--helper", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def make(inputs: Path, sizes: dict[str, int]) -> None:
    """Write base and fine-tunes; those that are there stay."""
    import numpy as np
    from merge_inputs import llama_shapes

    from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
    from weightsmith.tensors.floats import from_float32

    heads = sizes["hidden_size"] // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = llama_shapes(
        sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"], sizes["vocab_size"]
    )
    specs = [TensorSpec(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    side = {"config.json": json.dumps(config, indent=2).encode()}
    base = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    for number, name in enumerate(MODELS):
        if (inputs / name).exists():
            continue
        values = base
        if number:
            noise = np.random.default_rng(number).standard_normal(BLOCK, dtype=np.float32)
            values = base + np.float32(5e-4) * noise
        block = np.ascontiguousarray(from_float32(values, "BF16")).view(np.uint16).reshape(-1)
        at = 0
        with CheckpointWriter(
            inputs / name, specs, side_files=side, lineage=Lineage("benchmark"), max_shard_bytes=1_000_000_000
        ) as writer:
            for spec in specs:
                start = 0
                while start < spec.numel:
                    count = min(BLOCK - at, spec.numel - start)
                    writer.write_raw(spec.name, block[at : at + count].view(np.uint8), start)
                    start, at = start + count, (at + count) % BLOCK
            writer.commit()


def known_methods() -> dict[str, dict[str, Any]]:
    """Every merge method that needs no statistics: how many models, whether a base, tiles or matrices."""
    from weightsmith.registry import cards, load

    found = {}
    for card in cards("merging"):
        method = load(card.id, "merging")
        if getattr(method, "statistics", None):
            continue
        base_is_model = getattr(method, "base_is_model", False)
        found[card.id] = {
            "models": min(2, (method.max_models or 3) - base_is_model),
            "takes_base": base_is_model or method.base == "required",
            "spectral": bool(getattr(method, "spectral", False)),
        }
    return found


if __name__ == "__main__":
    if sys.argv[1:2] != ["--helper"]:
        main()
    elif sys.argv[2] == "make":
        make(Path(sys.argv[3]), json.loads(sys.argv[4]))
    elif sys.argv[2] == "methods":
        print(json.dumps(known_methods()))
    else:
        from weightsmith.runs.environment import versions

        print(json.dumps(versions(("weightsmith", "numpy", "torch"))))
