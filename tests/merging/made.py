"""Tiny checkpoints on the spot: two-layer models of a few thousand elements."""

import json

import numpy as np

from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes(layers=2, hidden=16, inner=24, vocabulary=40):
    found = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= {
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (hidden // 2, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,),
        }
    return found


def random_model(seed, layers=2, near=None, spread=1e-3, **sizes):
    """Name -> fp32 array; `near` a model, or weights of their own."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes(layers, **sizes).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        made[name] = 0.02 * noise if near is None else near[name] + np.float32(spread) * noise
    return made


def save(folder, tensors, dtype="BF16", config=None, side=None, max_shard_bytes=5_000_000_000):
    """Write a checkpoint; integer arrays keep their own dtype."""
    integers = {"int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL"}
    dtypes = {name: integers.get(str(values.dtype), dtype) for name, values in tensors.items()}
    specs = [TensorSpec(name, dtypes[name], values.shape) for name, values in sorted(tensors.items())]
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    config = CONFIG | {"num_hidden_layers": len(layers)} | (config or {})
    side_files = {"config.json": json.dumps(config).encode()} | (side or {})
    with CheckpointWriter(
        folder, specs, side_files=side_files, lineage=Lineage("made"), max_shard_bytes=max_shard_bytes
    ) as writer:
        for name, values in tensors.items():
            writer.write(name, np.ascontiguousarray(values).reshape(-1))
        writer.commit()
    return folder


def read(folder):
    """Name -> fp32 array of a checkpoint."""
    with Checkpoint.open(folder) as checkpoint:
        return {
            name: checkpoint.read(name).reshape(info.shape).copy()
            for name, info in checkpoint.tensors.items()
        }


def weight_bytes(folder):
    """Every stored tensor's bytes by name, whatever the shards."""
    with Checkpoint.open(folder) as checkpoint:
        return {name: bytes(checkpoint.read_raw(name)) for name in checkpoint.tensors}


def page(root, method, models=("m1", "m2", "m3"), base="base", **options):
    """A merge as a mapping."""
    config = {"method": method, "models": [str(root / model) for model in models]}
    if base is not None and method not in ("linear", "passthrough"):
        config["base"] = str(root / base)
    return config | options
