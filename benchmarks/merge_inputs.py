"""The parts of `merge.py` that need numpy: made checkpoints, and whether two outputs agree.

python benchmarks/merge_inputs.py make FOLDER CONFIG      a base and three fine-tunes; kept if they are there
python benchmarks/merge_inputs.py compare METHOD FOLDER   ours/ against theirs/, as JSON
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


def compare(method: str, folder: Path) -> dict[str, Any]:
    """Whether both wrote the same tensors, within what the method allows."""
    with (
        Checkpoint.open(folder / "ours") as ours,
        Checkpoint.open(folder / "theirs") as theirs,
        Checkpoint.open(folder / "base") as base,
    ):
        same = {name: info.shape for name, info in ours.tensors.items()} == {
            name: info.shape for name, info in theirs.tensors.items()
        }
        compared, agrees = (in_law if method == "dare_ties" else by_entry)(ours, theirs, base, method)
    return {"agrees": bool(same and agrees), "tensors": len(compared), **worst(compared)}


def by_entry(ours: Checkpoint, theirs: Checkpoint, base: Checkpoint, method: str) -> tuple[list[Any], bool]:
    """Share of entries that differ at all, and the largest difference in bfloat16 places."""
    allowed = 1e-3 if method == "linear" else 0.05
    compared = []
    for name in ours.tensors:
        one, other = (np.frombuffer(c.read_raw(name), np.int16).astype(np.int32) for c in (ours, theirs))
        apart = np.abs(one - other)
        if method == "ties":
            # What one keeps and the other doesn't is a matter of equal magnitudes; what both keep must agree.
            origin = np.frombuffer(base.read_raw(name), np.int16).astype(np.int32)
            both = (one != origin) & (other != origin)
            compared.append({"differing": np.mean(apart > 1), "places": int(apart[both].max(initial=0))})
        else:
            compared.append({"differing": np.mean(apart > 0), "places": int(apart.max())})
    within = all(entry["differing"] <= allowed for entry in compared)
    return compared, within and (method == "ties" or all(entry["places"] <= 1 for entry in compared))


def in_law(ours: Checkpoint, theirs: Checkpoint, base: Checkpoint, method: str) -> tuple[list[Any], bool]:
    """Mean magnitude of the change and share of changed entries of each large tensor."""
    compared = []
    for name, info in ours.tensors.items():
        if info.numel < 1 << 14:
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
