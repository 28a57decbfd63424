"""What names say: layers and ties, checked against what transformers writes."""

import json

import pytest
import torch
from safetensors import safe_open

from weightsmith.checkpoints import layer_index
from weightsmith.checkpoints.names import tied_names


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("transformer.h.0.attn.c_attn.bias", 0),
        ("h.7.ln_1.weight", 7),
        ("model.layers.3.mlp.experts.11.w1.weight", 3),
        ("lm_head.weight", None),
        ("model.embed_tokens.weight", None),
        ("model.conv2d.weight", None),
    ],
)
def test_the_layer_is_the_first_path_part_that_is_a_number(name, layer):
    assert layer_index(name) == layer


FAMILIES = [
    ("LlamaConfig", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("Qwen3Config", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ("Gemma3TextConfig", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}),
    ("GPTNeoXConfig", {"num_attention_heads": 2}),
    ("OPTConfig", {"num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 16}),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
def test_ties_are_those_transformers_makes(family, sizes, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    if family != "GPT2Config":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **sizes}
    config = getattr(transformers, family)(vocab_size=32, tie_word_embeddings=tied, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    found = tied_names(stored, json.loads((tmp_path / "config.json").read_text()))
    # GPT-NeoX calls its head `lm_head` in memory and `embed_out` in files.
    rename = {"lm_head.weight": "embed_out.weight"} if family == "GPTNeoXConfig" else {}
    state = {rename.get(name, name): values for name, values in model.state_dict().items()}
    absent = {name for name in state if name not in stored}
    assert set(found) == absent
    for alias, name in found.items():
        assert torch.equal(state[alias], state[name])


def test_the_config_decides_and_its_silence_means_the_files_do():
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    tie = {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_names(names, {"architectures": ["GemmaForCausalLM"]}) == tie
    assert tied_names(names, {"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": False}) == {}
    assert tied_names(names, {"architectures": ["GemmaModel"]}) == {}
    assert tied_names(names | {"lm_head.weight"}, {"tie_word_embeddings": True}) == {}


def test_ties_of_composed_models_and_of_encoders_with_decoders():
    vision = {"model.language_model.embed_tokens.weight", "model.vision_tower.x.weight"}
    assert tied_names(vision, {"text_config": {"tie_word_embeddings": True}}) == {
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }
    old = {"language_model.model.embed_tokens.weight"}
    assert tied_names(old, {"text_config": {"tie_word_embeddings": True}}) == {
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }
    assert tied_names({"shared.weight"}, {"architectures": ["T5ForConditionalGeneration"]}) == {
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
