"""Anyone's model: made by transformers, saved by it, merged here, loaded by it again.

What comes back must compute, bit for bit, the logits of the same merge done in memory. `linear` is done in
plain torch; `ties` and `resm` go through `merge_state_dicts`, on the modules' own state dicts: where
transformers stores experts one by one and holds them stacked in memory, that compares two different ways
through the code.
"""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from weightsmith.merging import merge, merge_state_dicts

transformers_logging.disable_progress_bar()

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("llama", SMALL),
    "qwen3": ("qwen3", SMALL | {"head_dim": 8}),
    "gemma3": ("gemma3_text", SMALL | {"head_dim": 8, "sliding_window": 16}),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "moe": ("mixtral", SMALL | {"num_local_experts": 4}),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = torch.arange(3, 19)[None]


def pairing():
    """Each architecture x sharding x tying x dtype once; every method meets every value of each."""
    pairs = []
    cells = itertools.product(MODELS, ("sharded", "whole"), ("tied", "untied"), DTYPES)
    for number, (kind, sharding, tying, dtype) in enumerate(cells):
        method = ("linear", "ties", "resm")[(number + number // 3) % 3]
        if (kind, method) == ("moe", "ties") and dtype != "fp32":
            # Stacked experts have another order, which TIES minds among equal magnitudes.
            method = "resm"
        pairs.append((kind, sharding, tying, dtype, method))
    return pairs


def build(kind, tying, dtype, seed, base=None):
    """A model with random weights, or `base` moved a little."""
    name, options = MODELS[kind]
    config = AutoConfig.for_model(name, **options, tie_word_embeddings=tying == "tied")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        if base is not None:
            model.load_state_dict({key: value.float() for key, value in base.state_dict().items()})
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(dtype)


def stored(model):
    """The state dict as files hold it: without the second name of tied weights, by name.

    Among equal magnitudes, common in 16 bits, TIES keeps the first: order counts.
    """
    seen, kept = set(), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            kept[name] = value
        seen.add(value.data_ptr())
    return dict(sorted(kept.items()))


def merged_in_memory(folder, method, base, tuned):
    """The model that the merge should make; its buffers are those of the base loaded from `folder`."""
    if method == "linear":
        states = [stored(model) for model in tuned]
        values = {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}
    else:
        config = json.loads(base.config.to_json_string(use_diff=False))
        values = merge_state_dicts(stored(base), [stored(model) for model in tuned], method, config=config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    loaded = model.load_state_dict(values, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize(("kind", "sharding", "tying", "dtype", "method"), pairing())
def test_a_merge_reloads_and_computes_what_an_in_memory_merge_computes(
    kind, sharding, tying, dtype, method, tmp_path
):
    base = build(kind, tying, DTYPES[dtype], 0)
    tuned = [build(kind, tying, DTYPES[dtype], seed, base) for seed in (1, 2)]
    for name, model in zip(("base", "a", "b"), (base, *tuned), strict=True):
        model.save_pretrained(tmp_path / name, max_shard_size="30KB" if sharding == "sharded" else "5GB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == (sharding == "sharded")
    page = {"method": method, "base": str(tmp_path / "base"), "models": [str(tmp_path / x) for x in "ab"]}
    merge(page, tmp_path / "merged")

    found, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.dtype == DTYPES[dtype]
    output = found.get_output_embeddings().weight.data_ptr()
    assert (output == found.get_input_embeddings().weight.data_ptr()) == (tying == "tied")
    wanted = logits(merged_in_memory(tmp_path / "base", method, base, tuned))
    assert torch.equal(logits(found.eval()), wanted)
    embedded = found.get_input_embeddings().weight
    assert not any(torch.equal(model.get_input_embeddings().weight, embedded) for model in (base, *tuned))


def test_a_merge_stores_the_names_and_dtypes_of_its_base(tmp_path):
    # transformers holds Mixtral's experts stacked and stores them one by one; norms may be kept in another
    # dtype.
    base = build("moe", "untied", torch.bfloat16, 0)
    base.model.norm.float()
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    build("moe", "untied", torch.bfloat16, 1, base).save_pretrained(tmp_path / "a")
    page = {"method": "resm", "base": str(tmp_path / "base"), "models": [str(tmp_path / "a")]}
    merge(page, tmp_path / "merged")
    assert headers(tmp_path / "merged") == headers(tmp_path / "base")
    assert headers(tmp_path / "merged")["model.norm.weight"] == ("F32", [32])
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in headers(tmp_path / "merged")


def headers(folder):
    """Name -> dtype and shape of everything stored in a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():  # noqa: SIM118 (no iterator)
                part = opened.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found
