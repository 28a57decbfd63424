"""Mediator: its conflict profile against our own `ties` and a stacked-tensor formulation; its serving against
one model.

    python benchmarks/mediator.py [--layers 16] [--hidden 1024] [--rounds 3] [--folder DIR] [--out FILE]
    python benchmarks/mediator.py --quick          tiny, to see that everything runs; writes to --out only

Profile   A base and three fine-tunes in bfloat16. Whole processes, start-up included, in turns: our profile,
          our `ties` at the same density counted in each tensor, and a plain formulation that loads every
          model, stacks each tensor, trims by a sort and compares signs in pairs. Ours and the plain one must
          count the same.
Serving   A mediated model with half of its blocks routed at a density of 0.1 against one plain merged model:
          latency of a prefill and of generated tokens, in `materialize` with a warm cache, in `delta` with
          one expert, and in `delta` with a batch of mixed tasks; and how long a switch to another mix takes.

The process that measures the profile imports neither numpy nor torch: a child's `ru_maxrss` starts at its
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mediator.json"
DENSITY, TASKS = 0.2, ("m1", "m2", "m3")
TARGETS = {"ties": 1.2, "stacked": 1 / 5}
SERVING = {"materialize": 1.02, "delta": 1.3}

PROFILE = """
import json, sys
from weightsmith.merging.mediator import MediatorConfig, conflict_profile
folder = sys.argv[1]
found = conflict_profile(folder + "/base", [f"{folder}/{name}" for name in ("m1", "m2", "m3")],
                         MediatorConfig(denoise_density=DENSITY), threads=THREADS)
print(json.dumps({block.name: block.conflict for block in found.blocks}))
"""
TIES = """
import sys
from weightsmith.merging import merge
folder = sys.argv[1]
models = [f"{folder}/{name}" for name in ("m1", "m2", "m3")]
merge({"method": "ties", "base": folder + "/base", "models": models, "density": DENSITY,
       "trim_scope": "tensor", "zero_sign": "positive"}, folder + "/ties", threads=THREADS, overwrite=True)
"""
STACKED = """
import json, sys
import torch
from safetensors.torch import load_file
from weightsmith.checkpoints import Checkpoint
from weightsmith.merging.mediator.family import block_of
torch.set_num_threads(THREADS)
def state(folder):
    with Checkpoint.open(folder) as found:
        files = sorted(found.descriptors())
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
folder = sys.argv[1]
base = state(folder + "/base")
models = [state(f"{folder}/{name}") for name in ("m1", "m2", "m3")]
sums = {}
for name, start in base.items():
    block = block_of(name)
    if block is None or start.ndim < 2:
        continue
    changes = torch.stack([model[name].float() - start.float() for model in models]).flatten(1)
    keep = int(DENSITY * changes.shape[1])
    order = changes.abs().argsort(dim=1, descending=True, stable=True)
    trimmed = torch.zeros_like(changes)
    trimmed.scatter_(1, order[:, :keep], changes.gather(1, order[:, :keep]))
    entry = sums.setdefault(block, [0, 0])
    for a in range(3):
        for b in range(a):
            product = trimmed[a].sign() * trimmed[b].sign()
            entry[0] += int((product < 0).sum())
            entry[1] += int((product != 0).sum())
print(json.dumps({block: opposite / max(1, shared) for block, (opposite, shared) in sums.items()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--size", default="m", help="test-bed size of the model that is served")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--folder", type=Path, default=cache / "weightsmith" / "benchmarks" / "mediator")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument(
        "--out", type=Path, help=f"where the results go (default {RESULTS}; none with --quick)"
    )
    options = parser.parse_args()
    if options.quick:
        options.layers, options.hidden, options.vocabulary, options.rounds = 2, 64, 100, 1
        options.size = "xs"
        with tempfile.TemporaryDirectory() as folder:
            results = measure(Path(folder), options)
    else:
        results = measure(options.folder, options)
    out = options.out or (None if options.quick else RESULTS)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")
        out.with_suffix(".md").write_text(table(results))
    print(table(results))


def measure(folder: Path, options: Any) -> dict[str, Any]:
    """Both parts."""
    profile = measure_profile(folder / f"{options.layers}x{options.hidden}", options)
    # From here on this process may import what it likes.
    return {"threads": options.threads, "profile": profile, "serving": measure_serving(folder, options)}


# ---- conflict profile


def measure_profile(folder: Path, options: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": options.hidden,
        "intermediate_size": 2 * options.hidden,
        "num_hidden_layers": options.layers,
        "vocab_size": options.vocabulary,
    }
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "merge_inputs.py", "make", folder, json.dumps(sizes)],
        check=True,
        env=environment(options.threads),
    )
    programs = {"profile": PROFILE, "ties": TIES, "stacked": STACKED}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, program in programs.items():
            warm(folder)
            runs[name].append(measured(program, folder, options.threads))
            print(f"{name}: {runs[name][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(folder / "ties", ignore_errors=True)
    ours, plain = (json.loads(runs[name][0]["printed"]) for name in ("profile", "stacked"))
    assert ours.keys() == plain.keys()
    assert all(abs(ours[block] - plain[block]) < 1e-12 for block in ours), "they count differently"
    largest = max(options.vocabulary * options.hidden, 2 * options.hidden**2)
    ratios = {
        name: sorted(a["seconds"] / b["seconds"] for a, b in zip(runs["profile"], runs[name], strict=True))
        for name in ("ties", "stacked")
    }
    return {
        "sizes": sizes,
        "rounds": options.rounds,
        "seconds": {name: statistics.median(run["seconds"] for run in made) for name, made in runs.items()},
        "memory_bytes": {name: max(run["memory_bytes"] for run in made) for name, made in runs.items()},
        "memory_limit_bytes": 4 * (len(TASKS) + 2) * largest,
        "ratios": {
            name: {
                "median": statistics.median(values),
                "range": [values[0], values[-1]],
                "at_most": TARGETS[name],
            }
            for name, values in ratios.items()
        },
    }


def measured(program: str, folder: Path, threads: int) -> dict[str, Any]:
    """Seconds, peak memory and output of a whole process."""
    text = program.replace("DENSITY", str(DENSITY)).replace("THREADS", str(threads))
    os.sync()  # what earlier runs left to write is not this one's
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", text, str(folder)], stdout=subprocess.PIPE, env=environment(threads), text=True
    ) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if child.returncode:
        sys.exit("a measured program failed")
    return {"seconds": seconds, "memory_bytes": usage.ru_maxrss * 1024, "printed": printed}


def warm(folder: Path) -> None:
    """Have the inputs in the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def environment(threads: int) -> dict[str, str]:
    """The children's: as many threads for every program."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


# ---- serving


def measure_serving(folder: Path, options: Any) -> dict[str, Any]:
    import numpy as np
    import torch

    from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
    from weightsmith.evaluation import load_model
    from weightsmith.merging.mediator import Mediator, MediatorConfig, build_mediator, plan_mediator
    from weightsmith.testbed import model_config, model_files, parameter_shapes

    torch.set_num_threads(1 if options.size != "m" else options.threads)
    torch.manual_seed(0)
    at = folder / f"serving-{options.size}"
    shutil.rmtree(at, ignore_errors=True)
    shapes = parameter_shapes(model_config(options.size))
    side = {name: text.encode() for name, text in model_files(options.size).items()}
    specs = [TensorSpec(name, "F32", shape) for name, shape in shapes.items()]
    tasks = ("one", "two", "three", "four")
    for index, name in enumerate(("base", *tasks)):
        rng, own = np.random.default_rng(0), np.random.default_rng(index)
        with CheckpointWriter(at / name, specs, side_files=side, lineage=Lineage("benchmark")) as writer:
            for tensor, shape in shapes.items():
                values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
                if index:
                    values += own.standard_normal(shape, np.float32) * np.float32(0.005)
                writer.write(tensor, values)
            writer.commit()
    experts = {task: at / task for task in tasks}
    plan = plan_mediator(at / "base", experts)
    blocks = [block.block for block in plan.blocks]
    plan = plan.with_routed(blocks[: len(blocks) // 2])
    report = build_mediator(at / "base", experts, at / "mediated", MediatorConfig(), plan=plan)
    plain = load_model(at / "base", dtype="float32")[0]
    modes = {mode: Mediator.from_pretrained(at / "mediated", mode=mode) for mode in ("materialize", "delta")}
    exported = modes["delta"].export_merged("one", at / "exported")
    merged = load_model(exported, dtype="float32")[0]
    copies = len(tasks) * sum(spec.nbytes for spec in specs)
    results: dict[str, Any] = {"bytes_of_copies": report.bytes / copies, "times": {}}
    length = 96
    for batch in (1, 8):
        ids = torch.randint(4, 100, (batch, length))
        mixed = [tasks[row % 4] for row in range(batch)]
        with torch.inference_mode():
            wanted = merged(input_ids=ids).logits
            for m in modes.values():
                torch.testing.assert_close(
                    m(input_ids=ids, task_id="one").logits, wanted, atol=1e-3, rtol=1e-3
                )
        arms: dict[str, Any] = {
            "plain": lambda steps, ids=ids: run(plain, ids, steps),
            "materialize": lambda steps, ids=ids: run(modes["materialize"], ids, steps, task_id="one"),
            "delta": lambda steps, ids=ids: run(modes["delta"], ids, steps, task_id="one"),
            "delta, mixed": lambda steps, ids=ids, mixed=mixed: run(
                modes["delta"], ids, steps, task_id=mixed
            ),
        }
        for steps, what in ((1, "prefill"), (1 + 16, "17 tokens")):
            times: dict[str, list[float]] = {name: [] for name in arms}
            for number in range(options.rounds * 5 + 1):
                for name, call in arms.items():
                    begun = time.perf_counter()
                    call(steps)
                    if number:  # the first round is the warm-up
                        times[name].append(time.perf_counter() - begun)
            against = times.pop("plain")
            results["times"][f"batch {batch}, {what}"] = {
                "plain": statistics.median(against),
                **{
                    name: {
                        "median": statistics.median(
                            ratios := [a / b for a, b in zip(found, against, strict=True)]
                        ),
                        "range": [min(ratios), max(ratios)],
                    }
                    for name, found in times.items()
                },
            }
    results["switch_seconds"] = switching(modes["materialize"], tasks, options.rounds)
    for m in modes.values():
        m.close()
    return results


def compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Median and range of the ratios, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def run(model: Any, ids: Any, steps: int, **routing: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            **routing,
        )


def switching(m: Any, tasks: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Median time of a switch to a new task, back to a task that is kept, and of reading an expert's file."""
    from weightsmith.merging.mediator.serving import Mix
    from weightsmith.merging.mediator.store import expert_file

    def seconds(work: Callable[[], object]) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    new, back, read = [], [], []
    for number in range(rounds * len(tasks)):
        task, other = tasks[number % len(tasks)], tasks[(number + 1) % len(tasks)]
        mix, before = (Mix.of([tuple(float(name == one) for name in tasks)]) for one in (task, other))
        m.serving.forget()
        m.serving.use(before)
        new.append(seconds(lambda mix=mix: m.serving.use(mix)))
        back.append(seconds(lambda before=before: m.serving.use(before)))
        read.append(seconds((m.store.checkpoint.path / expert_file(task)).read_bytes))
    return {"new": statistics.median(new), "back": statistics.median(back), "read": statistics.median(read)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    profile, serving = results["profile"], results["serving"]
    memory = profile["memory_bytes"]
    lines = [
        f"Conflict profile, three fine-tunes, {profile['sizes']}, {results['threads']} threads, whole "
        f"processes, median of {profile['rounds']} rounds:",
        "",
        "| | seconds | ours over it | target | peak memory |",
        "|---|---|---|---|---|",
        f"| conflict profile | {profile['seconds']['profile']:.2f} | | | {memory['profile'] / 1e6:.0f} MB, "
        f"at most {profile['memory_limit_bytes'] / 1e6:.0f} |",
    ]
    for name, label in (("ties", "our `ties`"), ("stacked", "plain formulation, stacked tensors")):
        ratio = profile["ratios"][name]
        low, high = ratio["range"]
        held = "holds" if ratio["median"] <= ratio["at_most"] else "missed"
        lines.append(
            f"| {label} | {profile['seconds'][name]:.2f} | {ratio['median']:.2f} ({low:.2f} .. {high:.2f}) | "
            f"{ratio['at_most']:g} at most, {held} | {memory[name] / 1e6:.0f} MB |"
        )
    lines += [
        "",
        f"Serving, four experts, half of the blocks routed: {100 * serving['bytes_of_copies']:.0f} % of the "
        "bytes of four models. Time over that of one plain model:",
        "",
        "| | plain, ms | materialize, cached | delta, one expert | delta, mixed tasks |",
        "|---|---|---|---|---|",
    ]
    for name, row in serving["times"].items():
        cells = [
            f"{row[arm]['median']:.2f} ({row[arm]['range'][0]:.2f} .. {row[arm]['range'][1]:.2f})"
            for arm in ("materialize", "delta", "delta, mixed")
        ]
        lines.append(f"| {name} | {1000 * row['plain']:.1f} | {' | '.join(cells)} |")
    switch = serving["switch_seconds"]
    lines += [
        "",
        f"Targets: materialize at most {SERVING['materialize']}, delta with one expert at most "
        f"{SERVING['delta']}. In `materialize` a switch to a task takes {1000 * switch['new']:.1f} ms the "
        f"first time, when it merges, and {1000 * switch['back']:.2f} ms while the result is kept; "
        f"reading its expert takes {1000 * switch['read']:.1f} ms. In `delta` experts lie side by side.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
