"""Whether the parts `matrix_indices` finds are what the architectures compute with."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from weightsmith.errors import InputError
from weightsmith.merging.matrices import matrix_indices

HEADS = {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
GPT = {"n_head": 4, "n_embd": 32, "n_layer": 1, "vocab_size": 40, "n_positions": 32}
ARCHITECTURES = {
    "phi3": ("phi3", HEADS | {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", HEADS | {"intermediate_size": 48}),
    "gpt_neox_japanese": ("gpt_neox_japanese", HEADS | {"intermediate_multiple_size": 2}),
    "bloom": ("bloom", {"n_head": 4, "hidden_size": 32, "n_layer": 1, "vocab_size": 40}),
    "persimmon": ("persimmon", HEADS | {"intermediate_size": 48, "qk_layernorm": False}),
    "falcon of one key": ("falcon", HEADS | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon of many keys": ("falcon", HEADS | {"multi_query": False, "new_decoder_architecture": False}),
    "falcon of groups": ("falcon", HEADS | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "codegen": (
        "codegen",
        GPT | {"rotary_dim": 4, "n_ctx": 32, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 1},
    ),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode of one key": ("gpt_bigcode", GPT | {"multi_query": True}),
    "gpt_bigcode of many keys": ("gpt_bigcode", GPT | {"multi_query": False}),
}
QKV = ("qkv_proj", "query_key_value", "c_attn")
TOKENS = torch.arange(2, 14)[None]


def build(architecture):
    """A tiny model, and its config as a checkpoint's config.json holds it."""
    kind, options = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(kind, **options)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases that count, scores that differ
    return model, json.loads(config.to_json_string(use_diff=False))


def fused_layer(model, names):
    """Name, weight and bias of the one fused layer."""
    found = {name: weight for name, weight in model.named_parameters() if set(names) & set(name.split("."))}
    name = next(name for name in found if name.endswith("weight"))
    return name, found[name], found.get(name.removesuffix("weight") + "bias")


def parts_of(name, weight, config):
    return [tuple(map(as_torch, index)) for index in matrix_indices(name, weight.shape, config, True)]


def as_torch(part):
    return part if isinstance(part, slice) else torch.from_numpy(part)


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@torch.no_grad()
def overwrite(weight, bias, index, scale):
    """Random numbers times `scale` into one part of a layer, bias included."""
    weight[index] = torch.randn_like(weight[index]) * scale
    if bias is not None:
        along = index[0] if len(bias) == len(weight) else index[1]
        bias[along] = torch.randn_like(bias[along]) * scale


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_of_a_fused_attention_are_query_key_and_value(architecture):
    model, config = build(architecture)
    name, weight, bias = fused_layer(model, QKV)
    query, key, value = parts_of(name, weight, config)
    seen = torch.zeros_like(weight)
    for part in (query, key, value):
        seen[part] += 1
    assert (seen == 1).all()

    # Without queries every score is equal, so keys can't matter while values do; and the other way round.
    for silent, other in ((query, key), (key, query)):
        model, config = build(architecture)
        name, weight, bias = fused_layer(model, QKV)
        overwrite(weight, bias, silent, 0.0)
        before = logits(model)
        overwrite(weight, bias, other, 0.3)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
        overwrite(weight, bias, value, 0.3)
        assert (logits(model) - before).abs().max() > 1e-3


def test_parts_of_a_fused_mlp_are_gate_and_up():
    model, config = build("phi3")
    name, weight, bias = fused_layer(model, ("gate_up_proj",))
    gate, up = parts_of(name, weight, config)
    overwrite(weight, bias, gate, 0.0)
    before = logits(model)
    overwrite(weight, bias, up, 0.3)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "parts"),
    [
        ("gpt_oss", (3, 32, 20), [(slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))]),
        ("llama4_text", (3, 32, 20), [(slice(None), slice(0, 10)), (slice(None), slice(10, 20))]),
        ("mixtral", (3, 20, 32), [(slice(0, 10), slice(None)), (slice(10, 20), slice(None))]),
        ("qwen3_moe", (3, 32, 32), [(slice(0, 16), slice(None)), (slice(16, 32), slice(None))]),
    ],
)
def test_stacked_experts_are_taken_apart_as_their_architecture_stores_them(kind, shape, parts):
    config = {"hidden_size": 32, "model_type": kind}
    found = list(matrix_indices("layers.0.mlp.experts.gate_up_proj", shape, config, True))
    assert found == [(expert, *part) for expert in range(3) for part in parts]
    whole = list(matrix_indices("layers.0.mlp.experts.gate_up_proj", shape, config, False))
    assert whole == [(expert, slice(None), slice(None)) for expert in range(3)]


@pytest.mark.parametrize(
    ("name", "shape", "config", "problem"),
    [
        (
            "a.query_key_value.weight",
            (96, 32),
            HEADS | {"model_type": "neo"},
            "architecture `neo` is not known",
        ),
        ("a.qkv_proj.weight", (90, 32), HEADS, r"make 32 \+ 32 \+ 32, not 90"),
        ("a.qkv_proj.weight", (96, 32), {}, "its config has no 'hidden_size'"),
        ("a.query_key_value.weight", (90, 32), HEADS | {"model_type": "bloom"}, "make 4 x 3 x 8, not 90"),
        ("a.experts.gate_up_proj", (2, 32, 20), {"hidden_size": 32, "model_type": "new"}, "neither side"),
    ],
)
def test_a_layout_that_can_not_be_told_is_an_error_that_says_what_to_do(name, shape, config, problem):
    with pytest.raises(InputError, match=problem) as caught:
        list(matrix_indices(name, shape, config, True))
    assert str(caught.value).startswith(f"{name}: can't tell the parts")
    assert "split_fused: false" in str(caught.value)
    assert list(matrix_indices(name, shape, config, False))
