"""Merges by the methods that fusion_bench has too, as whole processes: seconds, peak memory, and whether both
write the same.

    python benchmarks/merge_fusion_bench.py [--rounds 3] [--size 0.2B | tiny] [--methods all] [--folder DIR]
                                            [--out benchmarks/results/merge_fusion_bench.json]

A base and three fine-tunes of a Llama of width 1,024 in bfloat16 (see `merge_inputs.py`). fusion_bench 0.2.33
merges state dicts in memory, so its process reads the checkpoints, calls its function in fp32 and writes the
result; our process is `weightsmith merge` with a page of the same numbers. Its TIES counts its density over
the whole model and sums; so does our page. Embeddings and the output head are averaged by the methods that
decompose matrices, as both are asked to. Outputs must be equal, but for the last bfloat16 place in at most 1
of 1,000 entries; in TIES but for entries at the threshold, of which theirs keeps all that are equal, and in
decompositions but for what float32 leaves of small entries, to the last place in 19 of 20 (`spectral.py`
compares them on the changes themselves).

`spectral.py` times fusion_bench's TSV-M against ours on tensors alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from merge import OURS, ROOT, clean, helper, machine, measured, warm

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 512},
    "0.2B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32000},
}
MODELS = ("m1", "m2", "m3")
TABLES = ["model.embed_tokens.weight", "lm_head.weight"]
PAGES: dict[str, dict[str, Any]] = {
    "average": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "lambda": 0.3},
    "ties": {"method": "ties", "lambda": 0.3, "density": 0.2, "normalize": False},
    "slerp": {"method": "slerp", "t": 0.4},
    "iso_c": {"method": "iso_c"},
    "tsvm": {"method": "tsvm"},
}
# What runs in fusion_bench's own environment.
THEIRS = """
import json, sys
import torch
from safetensors.torch import load_file, save_file

folder, method, tables = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


def read(name):
    state = {}
    for file in sorted(__import__("pathlib").Path(folder, name).glob("*.safetensors")):
        state |= load_file(file)
    return {key: value.float() for key, value in state.items()}


def plus(base, change, scale=1.0):
    return {key: base[key] + scale * change[key] for key in base}


with torch.no_grad():
    if method == "average":
        from fusion_bench.method.simple_average import simple_average

        merged = simple_average([read(name) for name in ("m1", "m2", "m3")])
    elif method == "slerp":
        from fusion_bench.method.slerp.slerp import slerp_on_state_dicts

        merged = slerp_on_state_dicts(0.4, read("base"), read("m1"))
    else:
        base = read("base")
        changes = []
        for name in ("m1", "m2", "m3"):
            changes.append({key: value - base[key] for key, value in read(name).items()})
        if method == "task_arithmetic":
            from fusion_bench.utils.state_dict_arithmetic import state_dict_sum

            merged = plus(base, state_dict_sum(changes), 0.3)
        elif method == "ties":
            from fusion_bench.method.ties_merging import ties_merging_utils as ties

            flat = torch.stack([ties.state_dict_to_vector(change) for change in changes])
            change = ties.ties_merging(flat, reset_thresh=0.2, merge_func="sum")
            merged = plus(base, ties.vector_to_state_dict(change, changes[0]), 0.3)
        elif method == "iso_c":
            from fusion_bench.method.isotropic_merging.iso_utils import iso_c

            merged = plus(base, iso_c(changes, accelerator="cpu", exclude_keys=tables))
        else:
            from fusion_bench.method.task_singular_vector.utils import TSVM_utils

            change = TSVM_utils.compute_and_sum_svd_mem_reduction(
                changes, exclude_keys=tables, accelerator="cpu"
            )
            merged = plus(base, change)
    out = __import__("pathlib").Path(folder, "theirs")
    out.mkdir()
    save_file({key: value.bfloat16() for key, value in merged.items()}, out / "model.safetensors")
"""


def page(method: str, inputs: Path) -> dict[str, Any]:
    """Our page of a method."""
    names = ("base", "m1") if method == "slerp" else MODELS
    models = {"models": [str(inputs / name) for name in names]}
    base = {} if method in ("average", "slerp") else {"base": str(inputs / "base")}
    return {**PAGES[method], **base, **models}


def compete(folder: Path, size: str, method: str, rounds: int) -> dict[str, Any]:
    """All rounds of one method."""
    inputs = folder / f"fusion-{size}"
    helper("make", str(inputs), json.dumps(SIZES[size]))
    written = inputs / f"{method}.yml"
    written.write_text(json.dumps(page(method, inputs)))  # JSON is YAML
    commands = {
        "weightsmith": [str(OURS), "merge", str(written), str(inputs / "ours"), "--json"],
        "fusion_bench": [
            str(ROOT / ".venv-peers" / "bin" / "python"),
            "-c",
            THEIRS,
            str(inputs),
            method,
            json.dumps(TABLES),
        ],
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    agreement: dict[str, Any] = {}
    clean(inputs)
    for _ in range(rounds):
        for name, command in commands.items():
            warm([inputs / model for model in ("base", *MODELS)])
            runs[name].append(measured(command))
            print(f"{size} {method} {name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
        if not agreement:
            shutil.copy(inputs / "base" / "config.json", inputs / "theirs")
            kind = "places" if method in ("average", "task_arithmetic", "slerp") else "selection"
            agreement = json.loads(helper("compare", kind, str(inputs)))
            if not agreement["agrees"]:
                sys.exit(f"{size} {method}: the outputs differ: {agreement}")
        clean(inputs)
    median = {name: statistics.median(run["seconds"] for run in made) for name, made in runs.items()}
    memory = {name: max(run["memory_bytes"] for run in made) for name, made in runs.items()}
    return {
        "method": method,
        "size": size,
        "rounds": rounds,
        "seconds": median,
        "speedup": median["fusion_bench"] / median["weightsmith"],
        "memory_bytes": memory,
        "agreement": agreement,
        "runs": runs,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| size | method | Weightsmith | fusion_bench | faster | memory | fusion_bench's |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours, theirs = result["seconds"]["weightsmith"], result["seconds"]["fusion_bench"]
        memory = {name: f"{size / 1e6:.0f} MB" for name, size in result["memory_bytes"].items()}
        lines.append(
            f"| {result['size']} | `{result['method']}` | {ours:.1f} s | {theirs:.1f} s "
            f"| {result['speedup']:.1f}x | {memory['weightsmith']} | {memory['fusion_bench']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="0.2B", choices=SIZES)
    parser.add_argument("--methods", default=",".join(PAGES))
    parser.add_argument("--rounds", type=int, default=3)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--folder", type=Path, default=cache / "weightsmith" / "benchmarks")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "merge_fusion_bench.json"
    )
    options = parser.parse_args()
    if not list((ROOT / ".venv-peers").glob("lib/python*/site-packages/fusion_bench")):
        sys.exit("fusion_bench is missing: `make peers` installs it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    found = {(result["size"], result["method"]): result for result in known}
    for method in options.methods.split(","):
        found[options.size, method] = compete(options.folder, options.size, method, options.rounds)
    results = [found[key] for key in itertools.product(SIZES, PAGES) if key in found]
    options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
