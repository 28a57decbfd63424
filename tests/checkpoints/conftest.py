"""Small checkpoints, written with the safetensors library so that our own writer is never its own judge."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def tensors(rng) -> dict[str, np.ndarray]:
    """A llama-like state of two layers, float32."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "model.embed_tokens.weight": normal(16, 8),
        "model.layers.0.self_attn.q_proj.weight": normal(8, 8),
        "model.layers.0.mlp.up_proj.weight": normal(24, 8),
        "model.layers.1.self_attn.q_proj.weight": normal(8, 8),
        "model.layers.1.mlp.up_proj.weight": normal(24, 8),
        "model.norm.weight": normal(8),
        "lm_head.weight": normal(16, 8),
    }


WriteModel = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path) -> WriteModel:
    """A function that writes a model folder: `write_model("a", tensors, config, shards=2)`."""

    def write(name: str, tensors: dict[str, np.ndarray], config: dict | None = None, shards: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
        names = list(tensors)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[number::shards]
            save_file({n: tensors[n] for n in mine}, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(mine, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write
