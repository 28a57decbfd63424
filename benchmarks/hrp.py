"""What HRP costs: its truncation against PEFT's own ways to do it, and its preheat as a share of a training.

    python benchmarks/hrp.py [--rounds 3] [--width 1024] [--out benchmarks/results/hrp.json]

Truncation: one layer of `width` x 4 `width` with a trained adapter of rank 128, cut to rank 8, one thread:
ours by QR, `add_weighted_adapter` (svd) and `convert_to_lora` of PEFT, `torch.svd_lowrank` of the dense
product, and beside them what PiSSA does to begin an adapter of that layer. First all cuts are checked to be
the same. Preheat: a Llama of two layers; a step with an adapter of rank 64 against one of rank 8, and the
preheat and the truncation of a run of 1,000 steps against that run. Peak memory is what
a process of its own has more than before the truncation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.runs.environment import environment
from weightsmith.runs.memory import peak_rss_bytes, reset_peak, rss_bytes
from weightsmith.training.hrp.factors import principal

ROOT = Path(__file__).resolve().parents[1]
LARGE, SMALL, PREHEAT = 128, 8, 64
RUN_STEPS, PREHEAT_STEPS, ROWS, TOKENS = 1000, 30, 8, 256


class One(nn.Module):
    """One linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4 * width, width, bias=False)


def trained(width: int) -> Any:
    """A layer with an adapter of rank 128 whose spectrum falls, as training leaves it."""
    model = peft.get_peft_model(
        One(width), peft.LoraConfig(r=LARGE, lora_alpha=LARGE, target_modules=["layer"])
    )
    left, _ = factors(model)
    falls = 0.97 ** torch.arange(LARGE)
    with torch.no_grad():
        left.copy_(torch.randn(left.shape, generator=torch.Generator().manual_seed(1)) * falls)
    return model


def factors(model: Any) -> tuple[Tensor, Tensor]:
    layer = model.base_model.model.layer
    return layer.lora_B["default"].weight, layer.lora_A["default"].weight.mT


Cut = tuple[Tensor, Tensor]
"""(rows of the weight, 8) and (8, columns): their product is what is kept."""


def by_qr(model: Any) -> Cut:
    left, right = factors(model)
    (u, s, v), _ = principal(left, right, SMALL)
    return u * s[:SMALL], v.mT


def by_surgery(model: Any) -> Cut:
    # One adapter alone is copied, not cut; the same one twice is cut.
    model.add_weighted_adapter(
        ["default"] * 2, [0.5, 0.5], "cut", combination_type="svd", svd_rank=SMALL, svd_full_matrices=True
    )
    layer = model.base_model.model.layer
    found = layer.lora_B["cut"].weight * layer.scaling["cut"], layer.lora_A["cut"].weight
    model.delete_adapter("cut")
    return found


def by_conversion(model: Any) -> Cut:
    _, state = peft.convert_to_lora(model, rank=SMALL, progressbar=False)
    a, b = (next(value for name, value in state.items() if f"lora_{letter}" in name) for letter in "AB")
    return b, a


def by_lowrank(model: Any) -> Cut:
    left, right = factors(model)
    u, s, v = torch.svd_lowrank(left.detach() @ right.detach().mT, q=4 * SMALL, niter=4)
    return u[:, :SMALL] * s[:SMALL], v[:, :SMALL].mT


def pissa(model: Any) -> None:
    peft.get_peft_model(
        One(model.base_model.model.layer.in_features // 4),
        peft.LoraConfig(r=SMALL, target_modules=["layer"], init_lora_weights="pissa"),
    )


CUTS: dict[str, Callable[[Any], Any]] = {
    "HRP, by QR": by_qr,
    "PEFT add_weighted_adapter": by_surgery,
    "PEFT convert_to_lora": by_conversion,
    "svd_lowrank of the product": by_lowrank,
    "PiSSA's start": pissa,
}
TARGETS = (
    ("PEFT add_weighted_adapter", 15.0),
    ("PEFT convert_to_lora", 10.0),
    ("PiSSA's start", 10.0),
)


def agree(width: int) -> str:
    """All cuts are the same matrix, the approximate one to a hundredth."""
    model = trained(width)
    ours = torch.mm(*by_qr(model)).detach()
    for name, bound in (
        ("PEFT add_weighted_adapter", 1e-4),
        ("PEFT convert_to_lora", 1e-4),
        ("svd_lowrank of the product", 1e-2),
    ):
        other = torch.mm(*CUTS[name](model)).detach()
        away = float((ours - other).norm() / ours.norm())
        assert away < bound, f"{name}: {away:.1e} away"
    return "cuts equal to 1e-4, svd_lowrank's to 1e-2, of their norm"


def llama(width: int, rank: int) -> tuple[Any, Callable[[], None]]:
    """A model with an adapter, and its training step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    ids = torch.randint(0, 1000, (ROWS, TOKENS))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return model, step


def extracted(model: Any) -> None:
    """All directions of a large adapter."""
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            principal(module.lora_B["default"].weight, module.lora_A["default"].weight.mT, SMALL)


def seconds(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, in rounds in which all take turns; the first round doesn't count."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name, call in calls.items():
            took = seconds(call)
            if number >= 0:
                spent[name].append(took)
    return spent


def peak(name: str, width: int) -> int:
    """Bytes by which the peak of this process rises in a truncation.

    Not in the first one, which loads libraries: that is of a tiny layer.
    """
    CUTS[name](trained(max(LARGE, width // 8)))
    model = trained(width)
    reset_peak()
    before = rss_bytes()
    CUTS[name](model)
    return peak_rss_bytes() - before


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "hrp.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.memory_of:
        with contextlib.redirect_stdout(sys.stderr):
            found = peak(options.memory_of, options.width)
        print(found)
        return
    agreement = agree(options.width)
    print(f"same result: {agreement}", file=sys.stderr, flush=True)
    model = trained(options.width)
    cuts = in_turn({name: lambda cut=cut: cut(model) for name, cut in CUTS.items()}, options.rounds)
    command = [sys.executable, __file__, "--width", str(options.width), "--memory-of"]
    names = [name for name in CUTS if name != "PiSSA's start"]
    peaks = {name: int(subprocess.check_output([*command, name]).split()[-1]) for name in names}
    (large, large_step), (_, small_step) = llama(options.width, PREHEAT), llama(options.width, SMALL)
    whole = copy.deepcopy(large)
    steps = in_turn(
        {"preheat step": large_step, "step": small_step, "truncation": lambda: extracted(whole)},
        options.rounds,
    )
    one = {name: statistics.median(values) for name, values in steps.items()}
    preheat = PREHEAT_STEPS * one["preheat step"] + one["truncation"]
    results = {
        "machine": {**environment(), "threads": 1},
        "width": options.width,
        "rounds": options.rounds,
        "agreement": agreement,
        "seconds": {name: statistics.median(values) for name, values in cuts.items()},
        "peak_bytes": peaks,
        "peak_bound": 16 * 5 * options.width * LARGE,
        "steps": one,
        "share": preheat / (RUN_STEPS * one["step"]),
        "targets": [target(cuts, *wanted) for wanted in TARGETS],
        "step_ratio": ratio(steps["preheat step"], steps["step"]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    words = table(results)
    options.out.with_suffix(".md").write_text(words)
    print(words)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def target(cuts: dict[str, list[float]], other: str, least: float) -> dict[str, Any]:
    """How many times as long the other takes."""
    return {"theirs": other, "at_least": least, "ratio": ratio(cuts[other], cuts["HRP, by QR"])}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    width, steps = results["width"], results["steps"]
    lines = [
        f"One layer of {width} x {4 * width}, rank {LARGE} cut to {SMALL}, processor time on one thread,",
        f"median of {results['rounds']} rounds; {results['agreement']}.",
        "",
        "| | seconds | peak memory |",
        "|---|---|---|",
    ]
    for name, took in results["seconds"].items():
        size = results["peak_bytes"].get(name)
        lines.append(f"| {name} | {took:.3f} | {'–' if size is None else f'{size / 1e6:.0f} MB'} |")
    lines += ["", "| ratio | median | target | |", "|---|---|---|---|"]
    for found in results["targets"]:
        held = "holds" if found["ratio"] >= found["at_least"] else "missed"
        lines.append(
            f"| {found['theirs']} / HRP | {found['ratio']:.1f} | {found['at_least']:.0f} at least | {held} |"
        )
    held = "holds" if results["step_ratio"] <= 1.25 else "missed"
    took = f"{results['step_ratio']:.2f} | 1.25 at most | {held}"
    lines.append(f"| step at rank {PREHEAT} / at rank {SMALL} | {took} |")
    size, bound = results["peak_bytes"]["HRP, by QR"], results["peak_bound"]
    held = "holds" if size <= bound else "missed"
    lines.append(f"| peak of the truncation | {size / 1e6:.0f} MB | {bound / 1e6:.0f} MB at most | {held} |")
    lines += [
        "",
        f"Two layers of width {width}, {ROWS} rows of {TOKENS} tokens: a step {steps['step']:.2f} s, one of",
        f"the preheat {steps['preheat step']:.2f} s, all truncations {steps['truncation']:.2f} s.",
        f"{PREHEAT_STEPS} steps of preheat are {results['share']:.1%} of a training of {RUN_STEPS}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
