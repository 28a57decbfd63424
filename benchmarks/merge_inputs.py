"""The parts of `merge.py` that need numpy: made checkpoints, and whether two outputs agree.

python benchmarks/merge_inputs.py make FOLDER CONFIG      a base and three fine-tunes; kept if they are there
python benchmarks/merge_inputs.py compare KIND FOLDER   ours/ against theirs/, as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec

MODELS = ("base", "m1", "m2", "m3")
WEIGHT, CHANGE = np.float32(0.02), np.float32(5e-4)
CHUNK = 1 << 22
LARGE = 1 << 14  # entries; of smaller tensors shares say little
SUMMED = 1 << 24  # entries; lengths of larger tensors that are summed in float32 are off


def make(folder: Path, sizes: dict[str, int]) -> None:
    """Write the four checkpoints."""
    hidden, heads = sizes["hidden_size"], sizes["hidden_size"] // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = llama_shapes(hidden, sizes["intermediate_size"], sizes["num_hidden_layers"], sizes["vocab_size"])
    specs = [TensorSpec(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    side = {"config.json": json.dumps(config, indent=2).encode()}
    for model, name in enumerate(MODELS):
        if (folder / name).exists():
            continue
        with CheckpointWriter(
            folder / name, specs, side_files=side, lineage=Lineage("benchmark"), max_shard_bytes=1_000_000_000
        ) as writer:
            for place, spec in enumerate(specs):
                for start in range(0, spec.numel, CHUNK):
                    count = min(CHUNK, spec.numel - start)
                    values = normal(WEIGHT, count, 0, place, start)
                    if model:
                        values += normal(CHANGE, count, model, place, start)
                    writer.write(spec.name, values, start)
            writer.commit()


def llama_shapes(hidden: int, inner: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of an untied Llama."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{at}mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    return shapes


def normal(scale: np.float32, count: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * scale


def compare(kind: str, folder: Path) -> dict[str, Any]:
    """Whether both wrote the same tensors, within what the method allows."""
    with (
        Checkpoint.open(folder / "ours") as ours,
        Checkpoint.open(folder / "theirs") as theirs,
        Checkpoint.open(folder / "base") as base,
    ):
        same = {name: info.shape for name, info in ours.tensors.items()} == {
            name: info.shape for name, info in theirs.tensors.items()
        }
        if kind == "shapes":
            return {"agrees": same, "tensors": len(ours.tensors)}
        compared, agrees = (in_law if kind == "law" else by_entry)(ours, theirs, base, kind)
    return {"agrees": bool(same and agrees), "tensors": len(compared), **worst(compared)}


def by_entry(ours: Checkpoint, theirs: Checkpoint, base: Checkpoint, kind: str) -> tuple[list[Any], bool]:
    """Share of entries that differ at all, and the largest difference of the others.

    Differences count in bfloat16 places beyond what float32 rounds of the tensor's largest weight: a change
    that nearly cancels its weight leaves little else.
    """
    compared = []
    for name, info in ours.tensors.items():
        if kind == "selection" and info.numel < LARGE:
            continue
        origin, one, other = (c.read(name) for c in (base, ours, theirs))
        larger = np.maximum(np.abs(one), np.abs(other))
        noise = np.float32(2.0**-22) * np.abs(origin).max()
        places = np.maximum(np.abs(one - other) - noise, 0) / np.maximum(larger, noise) * np.float32(2.0**7)
        by_place = kind == "selection" or (kind == "angles" and info.numel > SUMMED)
        differing = np.mean(places > 1 if by_place else one != other)
        compared.append({"differing": differing, "places": 0.0 if by_place else float(places.max())})
    if kind == "selection":  # what one keeps and the other doesn't is a matter of equal magnitudes
        return compared, all(entry["differing"] <= 0.05 for entry in compared)
    return compared, all(entry["differing"] <= 1e-3 and entry["places"] <= 1 for entry in compared)


def in_law(ours: Checkpoint, theirs: Checkpoint, base: Checkpoint, kind: str) -> tuple[list[Any], bool]:
    """Mean magnitude of the change and share of changed entries of each large tensor."""
    compared = []
    for name, info in ours.tensors.items():
        if info.numel < LARGE:
            continue
        origin = base.read(name)
        changes = [c.read(name) - origin for c in (ours, theirs)]
        sizes = [float(np.abs(change).mean(dtype=np.float64)) for change in changes]
        shares = [float(np.mean(change != 0)) for change in changes]
        compared.append({"magnitude": abs(sizes[0] / sizes[1] - 1), "changed": abs(shares[0] - shares[1])})
    return compared, all(entry["magnitude"] < 0.01 and entry["changed"] < 0.01 for entry in compared)


def worst(compared: list[dict[str, float]]) -> dict[str, float]:
    return {f"worst {key}": float(max(entry[key] for entry in compared)) for key in compared[0]}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        print(json.dumps(compare(sys.argv[2], Path(sys.argv[3]))))
