"""The bed's models: Llama folders in three sizes, written from plain Python, byte for byte the same
everywhere.

A folder holds `config.json`, the character tokenizer and `generation_config.json`, and no weights: it says
what a run starts from (random initialisation). Neither torch nor transformers is needed to write it or to
know every tensor's shape, so a dry run can tell the exact size of what training will write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.errors import InputError, nearest
from weightsmith.runs.atomic import write_text
from weightsmith.testbed.alphabet import EOS, PAD, SPECIAL, VOCABULARY

SEQUENCE_LENGTH = 96


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the bed's model, and how it is trained.

    Attributes:
        layers: Decoder layers.
        hidden: Width of the residual stream.
        feed_forward: Width inside the gated MLP.
        heads: Attention heads.
        layer_drop: Chance that an inner layer is skipped in a training step; depth is prunable where it is
            not 0.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    layer_drop: float = 0.0


SIZES: dict[str, Size] = {
    "xs": Size(layers=4, hidden=96, feed_forward=256, heads=4),
    "s": Size(layers=8, hidden=128, feed_forward=256, heads=4, layer_drop=0.1),
    "m": Size(layers=16, hidden=384, feed_forward=1024, heads=6, layer_drop=0.1),
}


def model_config(size: str) -> dict[str, Any]:
    """Content of `config.json` for one of `SIZES`.

    Raises:
        InputError: no such size; names the nearest.
    """
    if size not in SIZES:
        raise InputError(f"no test-bed size `{size}`{nearest(size, SIZES)}; known: {', '.join(SIZES)}")
    chosen = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": EOS,
        "dtype": "float32",
        "eos_token_id": EOS,
        "head_dim": chosen.hidden // chosen.heads,
        "hidden_act": "silu",
        "hidden_size": chosen.hidden,
        "initializer_range": 0.02,
        "intermediate_size": chosen.feed_forward,
        "max_position_embeddings": 4 * SEQUENCE_LENGTH,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": chosen.heads,
        "num_hidden_layers": chosen.layers,
        "num_key_value_heads": chosen.heads,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": len(VOCABULARY),
    }


def model_files(size: str) -> dict[str, str]:
    """Name and content of every file of a model folder. Raises as `model_config`."""
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special["mask_token"] = "<mask>"
    tokenizer_config = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4 * SEQUENCE_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    generation = {"bos_token_id": EOS, "eos_token_id": EOS, "max_new_tokens": 64, "pad_token_id": PAD}
    contents = {
        "config.json": model_config(size),
        "generation_config.json": generation,
        "special_tokens_map.json": special,
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": tokenizer_config,
    }
    return {name: json.dumps(content, indent=2, sort_keys=True) + "\n" for name, content in contents.items()}


def write_model_folder(size: str, folder: str | Path) -> Path:
    """Write the model folder of one of `SIZES`; existing files of the same names are replaced.

    Raises:
        InputError: no such size.
        SystemFault: no space, no permission.
    """
    folder = Path(folder)
    for name, content in model_files(size).items():
        write_text(folder / name, content)
    return folder


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a Llama of this `config.json` stores, in the model's own order.

    Raises:
        InputError: the configuration is of another architecture.
    """
    if config.get("model_type") != "llama":
        raise InputError(f"parameter shapes are known for model_type llama, got {config.get('model_type')!r}")
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for part, of, biased in (
            ("self_attn", attention, config.get("attention_bias")),
            ("mlp", mlp, config.get("mlp_bias")),
        ):
            for projection, shape in of.items():
                shapes[f"{name}.{part}.{projection}_proj.weight"] = shape
                if biased:
                    shapes[f"{name}.{part}.{projection}_proj.bias"] = shape[:1]
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _tokenizer() -> dict[str, Any]:
    """A `tokenizer.json` of one character per token: BPE without merges, other characters removed first."""
    added = [
        {
            "id": VOCABULARY[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in SPECIAL
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"Regex": "[^\\n -~]"}, "content": ""},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(VOCABULARY),
            "merges": [],
        },
    }
