"""What the zero token and its cycles cost, against plain attention, concatenation and a plain Llama.

    python benchmarks/ztt.py [--rounds 9] [--quick] [--out benchmarks/results/ztt.json]

    attention   beside the zero token, against plain attention of the same kernel, and against the plain
                formulation that concatenates a key and a mask column (T = 512, causal); forward alone, and
                with the backward pass
    model       one cycle without zero token against transformers' Llama of the same size
    cache       one decoding step's update of 2,000 cached tokens, against a plain formulation of a cache that
                keeps one tensor a token and stacks them at each update
    exit        decoding of one row, tokens that are above the mean zero attention leaving, or all of them
                after the first of three cycles, against all cycles: the gain, as a share of what the skipped
                layers would give if they cost nothing. Later tokens read their keys and values, once for all
                cycles of a layer: `propagate` projects them, which takes a sixth of a layer's weights where
                every query head has a key head, a twentieth with one for four; `copy` copies the last ones.
                Where all leave, `propagate` with a key head each can give 0.83 of the ideal at most, which is
                shown and has no target

Contestants take turns on the same inputs, after their results were compared; medians of ratios. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from weightsmith.runs.atomic import write_json, write_text
from weightsmith.runs.environment import environment
from weightsmith.training import ZTTConfig, ZTTForCausalLM
from weightsmith.training.zero_token.attention import zero_attention, zero_scores

ROOT = Path(__file__).resolve().parents[1]
Call = Callable[[], Any]
TARGETS = {
    "attention / plain": ("at most", 1.10),
    "concatenation / attention": ("at least", 1.3),
    "model / Llama": ("at most", 1.05),
    "stacking cache / ours": ("at least", 5.0),
    "exit at the mean: share of the ideal gain": ("at least", 0.8),
}
SHOWN = ("exit of all: share of the ideal gain", "exit of all: with what must be projected")


def seconds(call: Call, times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def paired(ours: Call, theirs: Call, rounds: int, times: int) -> tuple[float, float, float]:
    """Median of theirs / ours over rounds in turns, and the two medians of seconds."""
    ours(), theirs()
    pairs = [(seconds(ours, times), seconds(theirs, times)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def attention(tokens: int, rounds: int, *, backward: bool) -> dict[str, float]:
    """Ours over plain, and concatenation over ours."""
    torch.manual_seed(0)
    scaling = 64**-0.5
    inputs = [torch.randn(1, 8, tokens, 64, requires_grad=backward) for _ in range(3)]
    key, bias = torch.randn(8, 64, requires_grad=backward), torch.zeros(8, requires_grad=backward)

    def beside(implementation: str) -> Tensor:
        q, k, v = inputs
        z = zero_scores(q, key, bias, scaling)
        found = zero_attention(
            q, k, v, z, None, scaling=scaling, is_causal=True, implementation=implementation
        )
        return found.out_BTHD

    def plain() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True).transpose(1, 2)

    torch.testing.assert_close(beside("lse"), beside("concat"), rtol=1e-4, atol=1e-5)

    def timed(make: Callable[[], Tensor]) -> Call:
        def call() -> None:
            out = make()
            if backward:
                out.sum().backward()

        return call

    ours = timed(lambda: beside("lse"))
    to_plain, own, theirs = paired(ours, timed(plain), rounds, 8)
    to_concat, _, joined = paired(ours, timed(lambda: beside("concat")), rounds, 4)
    return {
        "attention / plain": 1 / to_plain,
        "concatenation / attention": to_concat,
        "ours_seconds": own,
        "plain_seconds": theirs,
        "concatenation_seconds": joined,
    }


def sizes(width: int, layers: int, key_heads: int = 8) -> dict[str, Any]:
    return {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 8 * width // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }


@torch.no_grad()
def model(width: int, rounds: int) -> dict[str, float]:
    """One cycle against the Llama with the same weights."""
    theirs = LlamaForCausalLM(LlamaConfig(**sizes(width, 4))).eval()
    ours = ZTTForCausalLM(ZTTConfig(**sizes(width, 4), num_cycles=1, zero_token=False)).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.arange(256)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    ratio, own, other = paired(
        lambda: ours(ids, use_cache=False), lambda: theirs(ids, use_cache=False), rounds, 4
    )
    return {"model / Llama": 1 / ratio, "ours_seconds": own, "llama_seconds": other}


class StackingCache:
    """Plain formulation of a cache of looped models: a dictionary from position to one tensor a token, all
    of which are stacked at every update.
    """

    def __init__(self) -> None:
        self.keys: dict[int, dict[int, Tensor]] = {}
        self.values: dict[int, dict[int, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Add tokens; all of the slot's."""
        stacked = []
        for kept, new in ((self.keys.setdefault(slot, {}), keys), (self.values.setdefault(slot, {}), values)):
            for token in new.unbind(2):
                kept[len(kept)] = token
            stacked.append(torch.stack([kept[place] for place in sorted(kept)], 2))
        return stacked[0], stacked[1]

    def cut(self, slot: int) -> None:
        """Forget the last token."""
        for kept in (self.keys[slot], self.values[slot]):
            kept.pop(len(kept) - 1)


@torch.no_grad()
def cache(tokens: int, rounds: int) -> dict[str, float]:
    """One token more in eight slots."""
    torch.manual_seed(0)
    config = ZTTConfig(**sizes(128, 4), num_cycles=3)
    ours, theirs = DynamicCache(config=config), StackingCache()
    slots = range(config.num_hidden_layers)
    for slot in slots:
        states = torch.randn(1, 8, tokens, 16)
        assert torch.equal(ours.update(states, states, slot)[0], theirs.update(states, states, slot)[0])
    token = torch.randn(1, 8, 1, 16)

    def grow_ours() -> None:
        for slot in slots:
            ours.update(token, token, slot)
            ours.layers[slot].crop(-1)

    def grow_theirs() -> None:
        for slot in slots:
            theirs.update(token, token, slot)
            theirs.cut(slot)

    ratio, own, other = paired(grow_ours, grow_theirs, rounds, 1)
    return {"stacking cache / ours": ratio, "ours_seconds": own, "stacking_seconds": other}


@torch.no_grad()
def leaving(
    width: int, new: int, rounds: int, key_heads: int, exit_kv: str, *, all_leave: bool
) -> dict[str, float]:
    """Tokens a second with exit, over those without; the same tokens are read by both."""
    torch.manual_seed(0)
    net = ZTTForCausalLM(ZTTConfig(**sizes(width, 6, key_heads), num_cycles=3, exit_kv=exit_kv)).eval()
    prompt, tokens = torch.randint(0, 256, (1, 16)), torch.randint(0, 256, (new, 1, 1))
    used: list[int] = []
    signals: list[float] = []

    def decode(threshold: float, **more: Any) -> Call:
        def call() -> None:
            cache = net(prompt, use_cache=True, exit_threshold=threshold).past_key_values
            used.clear()
            for token in tokens:
                out = net(token, past_key_values=cache, exit_threshold=threshold, **more)
                used.append(int(out.num_cycles_used))
                signals.extend(out.exit_signal[:-1].flatten().tolist() if more else ())

        return call

    decode(1.0, output_exit_signal=True)()
    threshold = -1.0 if all_leave else statistics.fmean(signals)
    decode(threshold)()
    cycles, early = statistics.fmean(used), statistics.fmean(number < 3 for number in used)
    ratio, own, other = paired(decode(threshold), decode(1.0), rounds, 1)
    slots, middle = net.config.num_hidden_layers, len(net.config.middle)
    layer = dict(net.model.layers[0].named_parameters())
    filled = layer["self_attn.k_proj.weight"].numel() + layer["self_attn.v_proj.weight"].numel()
    filled /= sum(weight.numel() for weight in layer.values() if weight.ndim == 2)
    filled *= (exit_kv == "propagate") * early
    left = slots - (3 - cycles) * middle
    name = "exit of all" if all_leave else "exit at the mean"
    return {
        f"{name}: share of the ideal gain": (ratio - 1) / (slots / left - 1),
        f"{name}: with what must be projected": (slots / (left + filled * middle) - 1) / (slots / left - 1),
        "gain": ratio,
        "ideal_gain": slots / left,
        "cycles": cycles,
        "exit_seconds": own,
        "all_seconds": other,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small inputs, one round; writes to --out only")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quick, rounds = chosen.quick, 1 if chosen.quick else chosen.rounds
    width = 64 if quick else 512
    sections = {
        "attention, forward": attention(32 if quick else 512, rounds, backward=False),
        "attention, forward and backward": attention(32 if quick else 512, rounds, backward=True),
        "model": model(width, rounds),
        "cache": cache(20 if quick else 2000, rounds),
        **{
            f"exit{' of all' * everyone}, {heads}, {kind}": leaving(
                2 * width, 6 if quick else 48, max(1, rounds // 2), number, kind, all_leave=everyone
            )
            for everyone in (False, True)
            for heads, number in (("a key head each", 8), ("a key head for four", 2))
            for kind in ("propagate", "copy")
        },
    }
    lines = ["| section | ratio | measured | target |", "|---|---|---|---|"]
    for section, found in sections.items():
        for name, value in found.items():
            if name in TARGETS or name in SHOWN:
                target = " ".join(map(str, TARGETS.get(name, ("",))))
                lines.append(f"| {section} | {name} | {value:.2f} | {target} |")
    words = "\n".join(lines) + "\n"
    print(words)
    out = chosen.out or (None if quick else ROOT / "benchmarks" / "results" / "ztt.json")
    if out is not None:
        write_json(out, {"environment": environment(), "rounds": rounds, "sections": sections})
        write_text(out.with_suffix(".md"), words)


if __name__ == "__main__":
    main()
