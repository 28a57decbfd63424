"""The mean of 20 checkpoints of one run: Weightsmith against mergekit's `linear` and a plain script.

    python benchmarks/averaging.py [--weights 100] [--number 20] [--rounds 3] [--dtype BF16]
                                   [--folder DIR] [--out benchmarks/results/averaging.json]

Makes Llama-shaped checkpoints, gives them to every program in turns with the inputs in the page cache, and
compares what they wrote. Time and peak memory (`ru_maxrss`) are those of whole processes, start-up included.
The plain script loads every checkpoint with safetensors, stacks each tensor, takes its mean in fp32 and
saves.

The process that measures imports nothing but the standard library: a child's `ru_maxrss` starts at its
parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
MERGEKIT = ROOT / ".venv-peers" / "bin" / "mergekit-yaml"
TARGETS = {"mergekit": 0.6, "plain script": 0.5}
MEMORY = 1.5

MAKE = """
import json, sys
import numpy as np
from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
folder, number, millions, dtype = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
hidden, width = 768, 2048
layers = max(1, round((millions * 1e6 - 2 * 8000 * 768) / (4 * 768**2 + 3 * 768 * 2048)))
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
          "intermediate_size": width, "num_hidden_layers": layers, "vocab_size": 8000,
          "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048,
          "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
shapes = {name: (8000, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
shapes["model.norm.weight"] = (hidden,)
for i in range(layers):
    at = f"model.layers.{i}."
    shapes |= {at + f"self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
    shapes |= {at + f"mlp.{p}_proj.weight": (width, hidden) for p in ("gate", "up")}
    shapes[at + "mlp.down_proj.weight"] = (hidden, width)
    shapes |= {at + f"{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
specs = [TensorSpec(name, dtype, shape) for name, shape in sorted(shapes.items())]
for state in range(number):
    rng = np.random.default_rng(0)
    own = np.random.default_rng(1 + state)
    with CheckpointWriter(f"{folder}/checkpoint-{100 * (state + 1)}", specs, lineage=Lineage("benchmark"),
                          side_files={"config.json": json.dumps(config).encode()}) as writer:
        for spec in specs:
            base = rng.standard_normal(spec.numel, np.float32) * np.float32(0.02)
            writer.write(spec.name, base + own.standard_normal(spec.numel, np.float32) * np.float32(1e-3))
        writer.commit()
"""
OURS = """
import sys
from weightsmith.training import average_run
average_run(sys.argv[2:], sys.argv[1], method="uniform")
"""
PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file
states = [load_file(folder + "/model.safetensors") for folder in sys.argv[2:]]
mean = {}
for name, last in states[-1].items():
    mean[name] = torch.stack([state[name].float() for state in states]).mean(0).to(last.dtype)
import os
os.makedirs(sys.argv[1])
save_file(mean, sys.argv[1] + "/model.safetensors", {"format": "pt"})
"""
COMPARE = """
import json, sys
import numpy as np
from weightsmith.checkpoints import Checkpoint
first, *others = [Checkpoint.open(folder) for folder in sys.argv[1:]]
report = {}
for other in others:
    different = total = 0
    for name, info in first.tensors.items():
        a, b = first.read(name), other.read(name)
        # One place of the stored type, at the larger of the two.
        place = np.maximum(np.abs(a), np.abs(b)) * (2.0**-7 if info.dtype == "BF16" else 2.0**-22)
        assert np.all(np.abs(a - b) <= place + 1e-12), (other.name, name, float(np.abs(a - b).max()))
        different += int((a != b).sum())
        total += a.size
    report[other.name] = different / total
print(json.dumps(report))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=float, default=100, help="millions a checkpoint")
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="BF16", choices=["BF16", "F32"])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--folder", type=Path, default=cache / "weightsmith" / "benchmarks" / "averaging")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "averaging.json")
    options = parser.parse_args()
    if not MERGEKIT.exists():
        sys.exit(f"{MERGEKIT} is missing: `make peers` installs mergekit")
    inputs = options.folder / f"{options.number}x{options.weights:g}M-{options.dtype}"
    names = [inputs / f"checkpoint-{100 * (state + 1)}" for state in range(options.number)]
    if not all(name.is_dir() for name in names):
        shutil.rmtree(inputs, ignore_errors=True)
        inputs.mkdir(parents=True)
        python(MAKE, inputs, options.number, options.weights, options.dtype)
    page = inputs / "linear.yml"
    models = [{"model": str(name), "parameters": {"weight": 1.0}} for name in names]
    stored = {"BF16": "bfloat16", "F32": "float32"}[options.dtype]
    page.write_text(
        json.dumps({"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": stored})
    )
    commands = {
        "weightsmith": [str(PYTHON), "-c", OURS, str(inputs / "weightsmith"), *map(str, names)],
        "mergekit": [str(MERGEKIT), str(page), str(inputs / "mergekit"), "--quiet"],
        "plain script": [str(PYTHON), "-c", PLAIN, str(inputs / "plain script"), *map(str, names)],
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    agreement = {}
    for number in range(options.rounds):
        clean(inputs)
        for name, command in commands.items():
            warm(names)
            runs[name].append(measured(command))
            print(f"{name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        if number == 0:
            agreement = json.loads(python(COMPARE, *(inputs / name for name in commands)))
    one = sum(file.stat().st_size for file in names[0].iterdir())
    clean(inputs)
    results = summary(runs, agreement, one, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(results))
    print(table(results))


def summary(runs: dict[str, Any], agreement: dict[str, float], one: int, options: Any) -> dict[str, Any]:
    """Medians, ratios by round, memory."""
    ratios = {
        name: sorted(a["seconds"] / b["seconds"] for a, b in zip(runs["weightsmith"], made, strict=True))
        for name, made in runs.items()
        if name != "weightsmith"
    }
    return {
        "weights": options.weights * 1e6,
        "number": options.number,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "checkpoint_bytes": one,
        "cores": len(os.sched_getaffinity(0)),
        "agreement": agreement,
        "seconds": {name: statistics.median(run["seconds"] for run in made) for name, made in runs.items()},
        "memory_bytes": {name: max(run["memory_bytes"] for run in made) for name, made in runs.items()},
        "ratios": {
            name: {
                "median": statistics.median(values),
                "range": [values[0], values[-1]],
                "at_most": TARGETS[name],
            }
            for name, values in ratios.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    one = results["checkpoint_bytes"]
    lines = [
        f"Mean of {results['number']} checkpoints of {results['weights'] / 1e6:.0f} M weights in "
        f"{results['dtype']} ({one / 1e6:.0f} MB each), whole commands, {results['cores']} cores, median of "
        f"{results['rounds']} rounds; peak memory should be at most {MEMORY:g} of one checkpoint. Entries "
        "that differ from ours, all by the last place: "
        + ", ".join(f"{name} {share:.1e}" for name, share in results["agreement"].items())
        + ".",
        "",
        "| | seconds | ours over it | target | peak memory | of one checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in results["seconds"].items():
        memory = results["memory_bytes"][name]
        ratio = results["ratios"].get(name)
        shown = "| | |"
        if ratio:
            low, high = ratio["range"]
            held = "holds" if ratio["median"] <= ratio["at_most"] else "missed"
            shown = (
                f"| {ratio['median']:.2f} ({low:.2f} .. {high:.2f}) | {ratio['at_most']:g} at most, {held} |"
            )
        lines.append(f"| {name} | {seconds:.1f} {shown} {memory / 1e6:.0f} MB | {memory / one:.2f} |")
    return "\n".join(lines) + "\n"


def clean(inputs: Path) -> None:
    for name in ("weightsmith", "mergekit", "plain script"):
        shutil.rmtree(inputs / name, ignore_errors=True)


def warm(folders: list[Path]) -> None:
    """Have the inputs in the page cache."""
    for folder in folders:
        for file in folder.iterdir():
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass


def python(program: str, *arguments: Any) -> str:
    command = [str(PYTHON), "-c", program, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment()).stdout


def measured(command: list[str]) -> dict[str, float]:
    """Seconds and peak memory of a whole process."""
    os.sync()  # what earlier runs left to write is not this one's
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment()) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{command[0]} failed")
    return {"seconds": time.perf_counter() - begun, "memory_bytes": usage.ru_maxrss * 1024}


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    main()
